"""The rotation in a `config.json`: `rope_theta` and `rope_scaling` of older files, `rope_parameters` of newer."""

import math
from dataclasses import replace
from typing import Any

from jaxstack.models.decoder_config import DecoderConfig
from jaxstack.models.hf_families import Family
from jaxstack.models.hf_fields import Fields
from jaxstack.models.rope import ROPE_TYPES, RopeConfig
from jaxstack.runtime.errors import UserError

_FULL, _LOCAL = "full_attention", "sliding_attention"


def rope_from_hf(fields: Fields, family: Family, max_positions: int) -> tuple[RopeConfig, RopeConfig | None]:
    """The rotation of layers that see everything, and that of layers with a window where the family has another.

    Raises:
      UserError: a rope_type that is unknown, or a key that is missing or malformed.
    """
    if family.local_theta is None:
        # transformers 5 prefers the old key where a file has both; rope_theta may stand inside the object or beside it.
        name = "rope_scaling" if fields.given("rope_scaling") else "rope_parameters"
        newer = _object(fields, "rope_parameters")
        theta = fields.number("rope_theta", newer.number("rope_theta", family.theta))
        return _rope(_object(fields, name), fields, family, theta, max_positions), None

    parameters = _object(fields, "rope_parameters")
    scaling = _object(fields, "rope_scaling")
    full, local = (_object(parameters, kind) for kind in (_FULL, _LOCAL))
    # Older files have one scaling, of the layers that see everything.
    full = scaling if scaling.data else full
    beside = _object(parameters, _FULL).number("rope_theta", family.theta)
    rope = _rope(full, fields, family, fields.number("rope_theta", beside), max_positions)
    local_theta = fields.number("rope_local_base_freq", family.local_theta)
    return rope, _rope(local, fields, family, local_theta, max_positions)


def _object(fields: Fields, name: str) -> Fields:
    found = fields.get(name)
    if found is not None and not isinstance(found, dict):
        raise fields.error(name, "an object")
    return Fields(found or {}, fields.source, prefix=f"{fields.prefix}{name}.")


def _rope(rope: Fields, fields: Fields, family: Family, theta: float, max_positions: int) -> RopeConfig:
    theta = rope.number("rope_theta", theta)
    rope_type = rope.text("rope_type" if rope.given("rope_type") else "type", "default")
    rope_type = family.rope_aliases.get(rope_type, rope_type)
    if rope_type not in ROPE_TYPES:
        raise UserError(
            f"{fields.source}: {rope.prefix}rope_type: found {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}"
        )
    partial = 1.0
    for owner in (fields, rope):
        if owner.given("partial_rotary_factor"):
            partial = owner.number("partial_rotary_factor")
            if partial != 1.0 and not family.partial_rotary:
                raise owner.error("partial_rotary_factor", "1.0: this architecture rotates whole heads")
    values: dict[str, Any] = {"theta": theta, "rope_type": rope_type, "partial_rotary_factor": partial}
    if rope_type == "linear":
        values |= {"factor": rope.number("factor")}
    elif rope_type != "default":
        original = fields.integer("original_max_position_embeddings", None, optional=True) or rope.integer(
            "original_max_position_embeddings", max_positions
        )
        default = max(1.0, max_positions / original) if rope_type == "longrope" else None
        factor = rope.number("factor") if default is None else rope.number("factor", default)
        values |= {"factor": factor, "original_max_position_embeddings": original}
    if rope_type == "llama3":
        values |= {key: rope.number(key) for key in ("low_freq_factor", "high_freq_factor")}
    elif rope_type == "longrope":
        values |= {key: rope.numbers(key) for key in ("short_factor", "long_factor")}
        values |= {"attention_factor": rope.number("attention_factor", optional=True)}
    elif rope_type == "yarn":
        attention_factor = rope.number("attention_factor", optional=True)
        if attention_factor is None and rope.given("mscale") and rope.given("mscale_all_dim"):
            logarithm = 0.1 * math.log(max(values["factor"], 1))
            over, under = (logarithm * rope.number(key) + 1 for key in ("mscale", "mscale_all_dim"))
            attention_factor = over / under
        values |= {
            "beta_fast": rope.number("beta_fast", 32.0),
            "beta_slow": rope.number("beta_slow", 1.0),
            "truncate": rope.flag("truncate", True),
            "attention_factor": attention_factor,
        }
    try:
        return RopeConfig(**values)
    except UserError as error:
        raise UserError(f"{fields.source}: {error}") from None


def rope_to_hf(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The keys of both generations."""
    rope = config.rope
    parameters = _parameters(rope, family)
    data: dict[str, Any] = {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.rope_type == "default" else _without(parameters, "rope_theta"),
        "rope_parameters": parameters,
    }
    if family.partial_rotary:
        data["partial_rotary_factor"] = rope.partial_rotary_factor
    if rope.rope_type == "longrope":
        data["original_max_position_embeddings"] = rope.original_max_position_embeddings
        # Older readers insist on exactly these three where no more is needed.
        plain = replace(rope, attention_factor=None, factor=_longrope_factor(config)) == rope
        kept = (
            ("short_factor", "long_factor") if plain else ("short_factor", "long_factor", "factor", "attention_factor")
        )
        data["rope_scaling"] = {"type": "longrope"} | {k: parameters[k] for k in kept if k in parameters}
    if family.local_theta is not None:
        local = config.local_rope or rope
        data["rope_local_base_freq"] = local.theta
        data["rope_parameters"] = {_FULL: parameters, _LOCAL: _parameters(local, family)}
    return data


def _longrope_factor(config: DecoderConfig) -> float:
    return max(1.0, config.max_position_embeddings / (config.rope.original_max_position_embeddings or 1))


def _parameters(rope: RopeConfig, family: Family) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": rope.rope_type, "rope_theta": rope.theta}
    if rope.rope_type != "default":
        values["factor"] = rope.factor
    if rope.rope_type in ("llama3", "yarn", "longrope"):
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.rope_type == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if rope.rope_type == "longrope":
        values |= {"short_factor": list(rope.short_factor), "long_factor": list(rope.long_factor)}
    if rope.attention_factor is not None:
        values["attention_factor"] = rope.attention_factor
    if family.partial_rotary:
        values["partial_rotary_factor"] = rope.partial_rotary_factor
    return values


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in names}
