"""Whether an engine swaps, and with which sizes: decided at start-up from what the machine does, and said in a line."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil

from jaxstack.engine.config import EngineConfig, Sizes
from jaxstack.engine.memory.swap import CacheShape, ExpansionController, Rates, SwapConfig, capacity_tokens, gain, k_max
from jaxstack.engine.memory.swap.capacity import step_seconds
from jaxstack.engine.memory.swap.config import LARGEST_SHARE
from jaxstack.engine.memory.swap.sizing import SpacePlan, largest_share, plan_spaces
from jaxstack.models.decoder import Decoder
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.memory_spaces import Space, probe_spaces

# Beyond what is predicted to hide: the controller measures, and may find more.
_HEADROOM = 1.25
# Launching a layer with its pages takes the host about 0.35 ms (beside an H200), which computes it in 0.2: a few at a
# time hide it. Larger groups would take much of the device for their segments.
_LEAST_GROUPS = 8
_PROBE_BYTES, _PROBE_LAYERS = 1 << 23, 4


@dataclasses.dataclass(frozen=True)
class SwapStart:
    """What came of it.

    Attributes:
      plan: the sizes; None: no swapping.
      controller: of the host's share; None where it is fixed.
      kv_device_bytes: M.
      line: for whoever started the engine.
    """

    plan: SpacePlan | None
    controller: ExpansionController | None
    kv_device_bytes: int
    line: str


def start_swapping(
    decoder: Decoder,
    config: EngineConfig,
    swap: SwapConfig,
    chosen: Sizes,
    dtype: jnp.dtype,
    rates: Rates | None = None,
) -> SwapStart:
    """Decides.

    Args:
      chosen: window and pages without swapping: their bytes are M.
      rates: of the machine; None measures them.

    Raises:
      UserError: a setting that swapping does not go together with; more host memory than there is; sizes that do not
        work.
    """
    _check_features(config, swap)
    free = psutil.virtual_memory().available
    if swap.host_bytes > free:
        raise UserError(
            f"kv_host_gb: found {swap.host_bytes / 1e9:.1f} GB, expected at most the {free / 1e9:.1f} GB free"
        )
    model = decoder.config
    shape = cache_shape(decoder, jnp.dtype(dtype).itemsize)
    page_bytes = config.page_size * shape.kv_bytes
    budget = chosen.num_pages * model.num_layers * page_bytes
    sizes: dict[str, int] = {
        "kv_device_bytes": budget,
        "layers": model.num_layers,
        "page_bytes": page_bytes,
        "step_pages": -(-config.max_batch_tokens // config.page_size),
        "sequences": config.max_sequences,
        "group": layers_together(swap, model.num_layers),
    }
    group = sizes["group"]
    if swap.host_share is not None:
        plan = plan_spaces(swap, swap.host_share, **sizes)
        return SwapStart(plan, None, budget, f"swapping: {_capacities(plan, chosen, config)}, a fixed share")
    rates = rates or probe_rates(page_bytes * swap.chunk_pages * group)
    k = k_max(rates, shape, budget, staging=swap.staging_segments, group=group)
    tokens = capacity_tokens(shape, budget, 0.0)
    layer_s, moving_s = rates.layer_s(shape, tokens), rates.moving_s(shape, tokens)
    link = f"the link moves {rates.link_bytes_per_s / 1e9:.3g} GB/s, a layer computes in {1e3 * layer_s:.3g} ms"
    if k < 1:
        line = f"swapping off: {link}, one page set needs {1e3 * moving_s:.3g} ms"
        return SwapStart(None, None, budget, line)
    limit = largest_share(swap, min(LARGEST_SHARE, _HEADROOM * k / model.num_layers), **sizes)
    if limit == 0:
        plan_spaces(swap, swap.step, **sizes)  # says why, where it is not for want of a page
        return SwapStart(None, None, budget, "swapping off: the host's bytes hold no page")
    plan = plan_spaces(swap, limit, **sizes)
    if plan.pages <= chosen.num_pages:
        room = f"{plan.pages * config.page_size} tokens would fit, {chosen.num_pages * config.page_size} do without"
        return SwapStart(None, None, budget, f"swapping off: {room}, segments of {group} layers take the rest")
    slots, size = plan.device_slots, config.page_size
    controller = ExpansionController(
        swap,
        layers=model.num_layers,
        kv_bytes=shape.kv_bytes,
        # The device's part is fixed; a smaller share leaves part of the host's, and of the staging, unused.
        capacity=lambda share: slots * size / (1 - share),
        device_tokens=lambda share: float(slots * size),
        link_bytes_per_s=rates.link_bytes_per_s,
        device_bytes_per_s=rates.device_bytes_per_s,
        limit=limit,
    )
    reached = min(k, limit * model.num_layers)
    more = gain(rates, shape, budget, reached, staging=swap.staging_segments, group=group)
    full = capacity_tokens(shape, budget, reached / model.num_layers, staging=swap.staging_segments * group)
    part = rates.layer_s(shape, full)
    step = step_seconds(model.num_layers, reached, part, rates.moving_s(shape, full), staging=swap.staging_segments)
    added = step - model.num_layers * part
    line = (
        f"swapping: {_capacities(plan, chosen, config)}; up to {k:.1f} of {model.num_layers} layers' worth hides "
        f"({link}); predicted gain {more:.2f}x where requests wait for pages, added latency {1e3 * added:.2g} ms a step"
    )
    return SwapStart(plan, controller, budget, line)


def layers_together(swap: SwapConfig, layers: int) -> int:
    """How many layers to launch together: on a CPU one, elsewhere so many that launching hides behind computing.

    Raises:
      UserError: `swap` has a number that does not divide the layers.
    """
    if (asked := swap.layers_per_program) is not None:
        if layers % asked:
            raise UserError(f"layers_per_program: found {asked}, expected a divisor of the model's {layers} layers")
        return asked
    if jax.default_backend() == "cpu":
        return 1
    return max(g for g in range(1, layers + 1) if layers % g == 0 and (g == 1 or layers // g >= _LEAST_GROUPS))


def _capacities(plan: SpacePlan, chosen: Sizes, config: EngineConfig) -> str:
    size = config.page_size
    together = f", {plan.group} layers at a time" if plan.group > 1 else ""
    return (
        f"{chosen.num_pages * size} tokens without, {plan.pages * size} with ({plan.device_slots * size} on the "
        f"device, {plan.host_pages * size} on the host in {plan.host_bytes / 1e9:.2g} GB{together})"
    )


def _check_features(config: EngineConfig, swap: SwapConfig) -> None:
    """Raises UserError for what the swapping runner does not do."""
    wrong: dict[str, tuple[Any, Any]] = {
        "mesh": (config.mesh, None),
        "max_adapters": (config.max_adapters, 0),
        "speculation": (config.speculation, 0),
        "batch_invariant": (config.batch_invariant, False),
        "offload": (None if config.offload is None else "weights on the host", None),
        "placement": (swap.placement, "page_striped"),
    }
    for name, (found, expected) in wrong.items():
        if found != expected:
            raise UserError(f"swapping: found {name} = {found}, expected {expected}: they do not go together yet")


def cache_shape(decoder: Decoder, itemsize: int) -> CacheShape:
    """What a decoder, which may be abstract, asks of memory and processor."""
    from flax import nnx

    model = decoder.config
    arrays = [x for x in jax.tree.leaves(nnx.state(decoder)) if hasattr(x, "dtype")]
    weight_bytes, numbers = sum(x.size * x.dtype.itemsize for x in arrays), sum(x.size for x in arrays)
    kv_bytes = 2 * model.num_kv_heads * model.head_dim * itemsize
    return CacheShape(model.num_layers, kv_bytes, float(weight_bytes), float(numbers))


def probe_rates(slice_bytes: int) -> Rates:
    """Measures this machine for a moment: copies of `slice_bytes` from the host, and reading on the device."""
    spaces = probe_spaces()
    large = jnp.zeros(_PROBE_BYTES * (8 if jax.default_backend() != "cpu" else 1) // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    device = 2 * large.nbytes / _fastest(lambda: add(large))
    host = [
        spaces.put(np.zeros(max(1, slice_bytes // 4), np.float32), Space.HOST)
        for _ in range(max(_PROBE_LAYERS, _PROBE_BYTES // max(1, slice_bytes)))
    ]
    jax.block_until_ready(host)
    link = sum(x.nbytes for x in host) / _fastest(lambda: spaces.put(host, Space.DEVICE))
    # Only decode steps are to hide it: what they compute is bounded by memory, not by arithmetic.
    return Rates(device, link, 1e30)


def _fastest(run: Callable[[], Any], times: int = 4) -> float:
    jax.block_until_ready(run())
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - begin)
    return min(found)
