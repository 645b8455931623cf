"""Room for low-rank adapters in a decoder that serves, whatever its layout.

`add_slots` gives every linear layer of the stack an empty `AdapterStack`; `slot_contents` turns a PEFT adapter into
what one slot of each of them holds. A fused projection carries the adapters of its parts side by side: with
`A = [A_q A_k A_v]` and B block-diagonal, `(x A) B` is the three parts' own products next to each other, exactly. (B's
zeros cost memory and multiplications, about as many again as its numbers for gate and up; a separate product for each
part would read the rows of `x` as often.)
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.hf_names import hf_module, layers_having
from jaxstack.models.linear import AdapterStack, Linear, LoraSlots
from jaxstack.models.lora import Factors
from jaxstack.models.peft_format import PeftAdapter
from jaxstack.models.tensor_parallel import repeat_heads
from jaxstack.runtime.errors import UserError

# Projections that a serving layout, or a checkpoint, holds as one, and their parts in order.
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclasses.dataclass(frozen=True)
class SlotSite:
    """A linear layer with slots.

    Attributes:
      path: of the layer in the decoder, ("layers", "self_attn", "qkv_proj").
      layers: the numbers of its layers, in the order of its leading axis.
      in_features: of its input.
      parts: the checkpoint's names of the modules side by side in it, and the output features of each.
      head_copies: how many times it holds each key-value head (`jaxstack.models.tensor_parallel`).
      kv_heads: of the checkpoint.
    """

    path: tuple[str, ...]
    layers: tuple[int, ...]
    in_features: int
    parts: tuple[tuple[str, int], ...]
    head_copies: int = 1
    kv_heads: int = 1

    @property
    def out_features(self) -> int:
        return sum(features for _, features in self.parts)


def slot_sites(decoder: Decoder) -> list[SlotSite]:
    """The linear layers of the stack that can carry adapters, in the order data meets them."""
    return [_site(decoder.config, path, linear) for path, linear in _linears(decoder)]


def _linears(decoder: Decoder) -> Iterator[tuple[tuple[str, ...], Linear]]:
    for parent in ("self_attn", "mlp"):
        block = getattr(decoder.layers, parent)
        for name, child in vars(block).items() if block is not None else ():
            if isinstance(child, Linear):
                yield ("layers", parent, name), child


def _site(config: DecoderConfig, path: tuple[str, ...], linear: Linear) -> SlotSite:
    names = _PARTS.get(path[-1], (path[-1],))
    *_, in_features, out_features = linear.kernel.get_value().shape
    if path[-1] == "qkv_proj":
        widths = [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    else:
        widths = [out_features // len(names)] * len(names)
    copies = out_features // (config.num_kv_heads * config.head_dim) if path[-1] in ("k_proj", "v_proj") else 1
    layers = layers_having(config, path)
    return SlotSite(path, layers, in_features, tuple(zip(names, widths)), copies, config.num_kv_heads)


def add_slots(decoder: Decoder, slots: int, rank: int, dtype: jnp.dtype) -> None:
    """Gives every linear layer of the stack room for `slots` adapters of at most `rank`, all empty."""
    for path, linear in _linears(decoder):
        site = _site(decoder.config, path, linear)
        shape, width = (len(site.layers), slots + 1), rank * len(site.parts)
        linear.lora = LoraSlots(
            AdapterStack(
                jnp.zeros((*shape, site.in_features, width), dtype),
                jnp.zeros((*shape, width, site.out_features), dtype),
                jnp.zeros(shape, dtype),
            )
        )


def slot_contents(
    sites: list[SlotSite], adapter: PeftAdapter, rank: int, dtype: jnp.dtype, *, source: str | Path
) -> dict[tuple[str, ...], AdapterStack]:
    """What one slot of every site holds for an adapter: host arrays `a [L, in, r]`, `b [L, r, out]`, `scale [L]`.

    The branch's scale is multiplied into B, since it may differ between the parts of a site.

    Args:
      rank: of the slots.
      source: what messages call the adapter.

    Raises:
      UserError: the adapter is a DoRA, for a module that has no slot, of a larger rank than the slots, or of another
        shape.
    """
    if any(found.magnitude is not None for found in adapter.factors.values()):
        raise UserError(
            f"{source}: use_dora is true, which the slots of a server do not hold; expected a plain LoRA (merge a DoRA "
            "into its model instead)"
        )
    factors = dict(_apart(sites, adapter.factors))
    contents = {}
    for site in sites:
        width = rank * len(site.parts)
        a = np.zeros((len(site.layers), site.in_features, width), np.float32)
        b = np.zeros((len(site.layers), width, site.out_features), np.float32)
        for i, layer in enumerate(site.layers):
            column = 0
            for number, (part, features) in enumerate(site.parts):
                module = hf_module((*site.path[:-1], part), layer)
                found = factors.pop(module, None)
                if found is not None:
                    _check(found, module, rank, site.in_features, features // site.head_copies, source)
                    if site.head_copies > 1:
                        copied = repeat_heads(found.b, site.kv_heads, site.head_copies)
                        found = dataclasses.replace(found, b=copied)
                    r = found.a.shape[1]
                    row = number * rank
                    a[i, :, row : row + r] = found.a
                    b[i, row : row + r, column : column + features] = found.scale * found.b
                column += features
        scale = np.ones((len(site.layers),), np.float32)
        contents[site.path] = AdapterStack(*cast(list[Array], [x.astype(dtype) for x in (a, b, scale)]))
    if factors:
        raise UserError(
            f"{source}: adapts {min(factors)!r}, which takes no adapter here; expected linear layers of the decoder's "
            "attention and MLP"
        )
    return contents


def _check(found: Factors, module: str, rank: int, in_features: int, features: int, source: str | Path) -> None:
    if found.a.shape[1] > rank:
        raise UserError(f"{source}: {module} has rank {found.a.shape[1]}, expected at most max_adapter_rank = {rank}")
    shape = (found.a.shape[0], found.b.shape[1])
    if shape != (in_features, features):
        raise UserError(
            f"{source}: adapts {module} from {shape[0]} to {shape[1]} features, expected {in_features} to {features}: "
            "it was made for another model"
        )


def _apart(sites: list[SlotSite], factors: Mapping[str, Factors]) -> Iterator[tuple[str, Factors]]:
    """Factors by the names of single projections: a checkpoint's fused one gives each part its columns of B."""
    widths = {part: features for site in sites for part, features in site.parts}
    for module, found in factors.items():
        parent, _, name = module.rpartition(".")
        parts = _PARTS.get(name, ())
        if not parts or found.b.shape[1] != sum(widths.get(part, 0) for part in parts):
            yield module, found
            continue
        column = 0
        for part in parts:
            yield f"{parent}.{part}", dataclasses.replace(found, b=found.b[:, column : column + widths[part]])
            column += widths[part]


def write_slot(
    stacks: Sequence[AdapterStack], slot: Int[Array, ""], contents: Sequence[AdapterStack]
) -> list[AdapterStack]:
    """The stacks with one slot replaced by `contents`, which have no adapter axis."""
    names = ("a", "b", "scale")
    return [
        AdapterStack(*(getattr(stack, n).at[:, slot].set(getattr(fresh, n)) for n in names))
        for stack, fresh in zip(stacks, contents, strict=True)
    ]
