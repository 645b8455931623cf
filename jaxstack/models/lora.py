"""Low-rank adapters (Hu et al. 2021) on the decoder's own linear layers.

Every projection of a decoder is a `models.linear.Linear`, and the adapter branch lives in that one class, so no call
path can go round it. `attach` puts factors into the layers that a `LoraConfig` names; training then differentiates
`LoraParam`s only.

Layers are stacked, so a site's factors are [num_layers, n_adapters, in, r]. A layer that is not targeted, and the ranks
above a layer's own, hold zeros in both factors: their gradients are products with those zeros, so they stay zero
exactly. So do the magnitudes of layers and adapters that are no DoRA.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxstack.models.decoder import Decoder
from jaxstack.models.hf_names import hf_module, layers_having
from jaxstack.models.linear import Linear, LoraWeights
from jaxstack.runtime.errors import UserError

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Where adapters go and how large they are. Names and matching are PEFT's.

    Attributes:
      r: rank.
      alpha: the branch is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023).
      targets: ("all-linear",): every linear layer except the output head; or names that a module's path ends with
        ("q_proj"), or one regular expression that the whole path matches (r"model\\.layers\\.[01]\\.mlp\\..*").
      use_rslora: see alpha.
      use_dora: also train the norm of each output's weights apart from their direction (Liu et al. 2024); in training
        and merging, not in a server's slots.
      rank_pattern, alpha_pattern: (pattern, value) pairs that override r and alpha for modules whose path ends with a
        match.
    """

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise UserError(f"lora.targets={self.targets!r}: expected a tuple of names")
        if not self.targets or not all(isinstance(t, str) and t for t in self.targets):
            raise UserError(f"lora.targets={self.targets!r}: expected at least one module name, or all-linear")
        for name, rank in (("lora.r", self.r), *((f"lora.rank_pattern[{p}]", r) for p, r in self.rank_pattern)):
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise UserError(f"{name}={rank!r}: expected an integer of at least 1")
        for name, alpha in (
            ("lora.alpha", self.alpha),
            *((f"lora.alpha_pattern[{p}]", a) for p, a in self.alpha_pattern),
        ):
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not alpha > 0:
                raise UserError(f"{name}={alpha!r}: expected a positive number")
        for pattern in (*self.targets, *(p for p, _ in (*self.rank_pattern, *self.alpha_pattern))):
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora: {pattern!r} is not a regular expression: {error}") from error

    def rank_of(self, module: str) -> int:
        """The rank at a Hugging Face module path."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """What the branch at a Hugging Face module path is multiplied by."""
        rank, alpha = self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def matches(self, module: str) -> bool:
        """Whether a Hugging Face module path is targeted."""
        if self.targets == (ALL_LINEAR,):
            return module != "lm_head"
        if any(module == target or module.endswith("." + target) for target in self.targets):
            return True
        # Only one lone entry can be a regular expression, as in PEFT; "q_proj" is then also one that matches nothing.
        return len(self.targets) == 1 and re.fullmatch(self.targets[0], module) is not None


def _by_pattern(patterns, module: str, default):
    for pattern, value in patterns:
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer that may carry adapters: one module of the decoder, one or more of a checkpoint.

    Attributes:
      path: ("layers", "self_attn", "q_proj").
      linear: the layer itself, its kernel `[num_layers, in, out]`, or `[in, out]` outside the stack.
      modules: Hugging Face module paths, one for each layer of the stack, or just one.
    """

    path: tuple[str, ...]
    linear: Linear
    modules: tuple[str, ...]

    @property
    def stacked(self) -> bool:
        return self.path[0] == "layers"

    @property
    def in_features(self) -> int:
        return self.linear.kernel.get_value().shape[-2]

    @property
    def out_features(self) -> int:
        return self.linear.kernel.get_value().shape[-1]


def sites(model: Decoder) -> list[Site]:
    """Every linear layer of a decoder, in the order data meets them."""
    found = []
    for path, linear in _linears(model):
        layers = layers_having(model.config, path) if path[0] == "layers" else (None,)
        found.append(Site(path, linear, tuple(hf_module(path, layer) for layer in layers)))
    return found


def _linears(model: Decoder) -> Iterator[tuple[tuple[str, ...], Linear]]:
    layers = model.layers
    for parent in ("self_attn", "mlp"):
        block = getattr(layers, parent)
        for name, child in vars(block).items() if block is not None else ():
            if isinstance(child, Linear):
                yield ("layers", parent, name), child
    if model.lm_head is not None:
        yield ("lm_head",), model.lm_head


@dataclasses.dataclass(frozen=True)
class Factors:
    """One module's factors as PEFT has them, transposed: `a [in, r]`, `b [r, out]`, the branch's scale, and the
    `magnitude [out]` of a DoRA.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


def attach(model: Decoder, config: LoraConfig, *, seed: int = 0) -> dict[str, int]:
    """Gives the targeted layers a fresh adapter in slot 1 (slot 0 stays "no adapter").

    A is uniform in +-1/sqrt(in), B is zero, a DoRA's magnitude is the norm of the kernel's columns, all float32: the
    model's output does not change (PEFT's default).

    Returns:
      Site path -> number of layers of it that are targeted.

    Raises:
      UserError: nothing is targeted (the message lists the modules), or a target names no module.
    """
    all_sites = sites(model)
    modules = [module for site in all_sites for module in site.modules]
    for target in config.targets:
        alone = dataclasses.replace(config, targets=(target,))
        if not any(alone.matches(module) for module in modules):
            names = sorted({".".join(site.path).removeprefix("layers.") for site in all_sites})
            raise UserError(f"lora.targets: {target!r} matches no module; the model has {', '.join(names)}")
    fresh: dict[str, Factors] = {}
    for site in all_sites:
        for layer, module in enumerate(site.modules):
            if not config.matches(module):
                continue
            # Keyed by name: the factors of one module do not depend on which others are targeted.
            rng = np.random.Generator(np.random.Philox(key=[seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(module.encode())]))
            bound, rank = 1 / math.sqrt(site.in_features), config.rank_of(module)
            fresh[module] = Factors(
                rng.uniform(-bound, bound, (site.in_features, rank)).astype(np.float32),
                np.zeros((rank, site.out_features), np.float32),
                config.scale_of(module),
                _column_norms(site, layer) if config.use_dora else None,
            )
    set_adapters(model, [fresh])
    return {".".join(s.path): n for s in all_sites if (n := sum(map(config.matches, s.modules)))}


def _column_norms(site: Site, layer: int) -> np.ndarray:
    kernel = site.linear.kernel.get_value()
    return np.linalg.norm(np.asarray(kernel[layer] if site.stacked else kernel, np.float32), axis=0)


def set_adapters(model: Decoder, adapters: Sequence[Mapping[str, Factors]]) -> None:
    """Puts adapters into slots 1, 2, ...; each maps Hugging Face module paths to factors. Replaces what was there.

    Ranks may differ between modules and adapters: factors are padded with zeros to the largest at each site, which is
      exact.
    """
    for site in sites(model):
        used = [[adapter.get(module) for module in site.modules] for adapter in adapters]
        ranks = [f.a.shape[1] for column in used for f in column if f is not None]
        if not ranks:
            site.linear.lora = None
            continue
        layers, slots, rank = len(site.modules), len(adapters) + 1, max(ranks)
        a = np.zeros((layers, slots, site.in_features, rank), np.float32)
        b = np.zeros((layers, slots, rank, site.out_features), np.float32)
        scale = np.zeros((layers, slots), np.float32)
        magnitude = np.zeros((layers, slots, site.out_features), np.float32)
        dora = np.zeros((layers, slots), bool)
        for slot, column in enumerate(used, start=1):
            for layer, factors in enumerate(column):
                if factors is not None:
                    r = factors.a.shape[1]
                    a[layer, slot, :, :r], b[layer, slot, :r] = factors.a, factors.b
                    scale[layer, slot] = factors.scale
                    if factors.magnitude is not None:
                        magnitude[layer, slot], dora[layer, slot] = factors.magnitude, True
        arrays = [a, b, scale, magnitude, dora] if dora.any() else [a, b, scale]
        site.linear.lora = LoraWeights(*(jnp.asarray(x if site.stacked else x[0]) for x in arrays))


def adapter_factors(model: Decoder, config: LoraConfig, slot: int = 1) -> dict[str, Factors]:
    """The factors in a slot, by Hugging Face module path, without the padding; only the modules that `config`
    targets.
    """
    found = {}
    for site in sites(model):
        lora = site.linear.lora
        if not isinstance(lora, LoraWeights):
            continue
        variables = (lora.a, lora.b, lora.scale, lora.magnitude, lora.dora)
        arrays = [None if v is None else np.asarray(v.get_value()) for v in variables]
        a, b, scale, magnitude, dora = (x if x is None or site.stacked else x[None] for x in arrays)
        assert a is not None and b is not None and scale is not None
        for layer, module in enumerate(site.modules):
            if config.matches(module):
                r = config.rank_of(module)
                has_magnitude = magnitude is not None and dora is not None and dora[layer, slot]
                found[module] = Factors(
                    a[layer, slot, :, :r],
                    b[layer, slot, :r],
                    float(scale[layer, slot]),
                    magnitude[layer, slot] if magnitude is not None and has_magnitude else None,
                )
    return found


def merge(model: Decoder, slot: int = 1) -> Decoder:
    """A decoder whose kernels are `kernel + scale * A @ B`, a DoRA's columns scaled to their magnitude, computed in
    float32 and cast back, without adapters.

    The given model keeps its adapters. There is no way back: the sum rounds.
    """
    merged = nnx.clone(model)
    for site in sites(merged):
        lora = site.linear.lora
        if not isinstance(lora, LoraWeights):
            continue
        kernel = site.linear.kernel.get_value()
        a, b, scale = (v.get_value().astype(jnp.float32) for v in (lora.a, lora.b, lora.scale))
        with jax.default_matmul_precision("highest"):
            delta = jnp.einsum("...ir,...ro->...io", a[..., slot, :, :], b[..., slot, :, :])
        total = kernel.astype(jnp.float32) + delta * scale[..., slot, None, None]
        factors = lora.column_factors(kernel)
        if factors is not None:
            total = total * factors[..., slot, None, :]
        site.linear.kernel.set_value(total.astype(kernel.dtype))
        site.linear.lora = None
    return merged
