"""Where a training job's arrays lie: a mesh of devices, and one table that says which mesh axis cuts what.

Every axis of a parameter has a name ("embed", "mlp", ...), `RULES` maps names to mesh axes, and XLA derives the rest:
the same jitted step runs on one device and on many. "data" devices hold copies of the parameters, "fsdp" devices a
share of each, put together layer by layer as it is needed (Rajbhandari et al. 2020, stage 3), and "tensor" devices
share heads and columns (Shoeybi et al. 2019). Rows of a batch are dealt out over data and fsdp.

On one device nothing is said at all, so its program is what it would be without this file.

A CPU may pretend to be several devices (XLA_FLAGS=--xla_force_host_platform_device_count=8, and NPROC=256, the number
of threads): good for tests along one axis. Along several, XLA's CPU backend takes sums over different groups of devices
in no fixed order (jax 0.10), so that two devices may wait for each other; the process ends after a minute.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array, Float, Shaped

from jaxstack.models import DecoderConfig
from jaxstack.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")

RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "adapter": None,
    "expert": None,
    "layer": None,
    "rank": None,
}
"""The mesh axis that cuts an axis of this name; None for whole everywhere."""

_ROWS = ("data", "fsdp")

# Inputs and outputs of the decoder's matrices.
_MATRICES = {
    "q_proj": ("embed", "heads"),
    "k_proj": ("embed", "kv"),
    "v_proj": ("embed", "kv"),
    "o_proj": ("heads", "embed"),
    "gate_proj": ("embed", "mlp"),
    "up_proj": ("embed", "mlp"),
    "down_proj": ("mlp", "embed"),
    "router": ("embed", "expert"),
    "lm_head": ("embed", "vocab"),
}

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis of the mesh; their product is the number of devices used.

    Attributes:
      data: copies of the parameters, each with its share of the batch's rows.
      fsdp: devices that hold a share of every parameter and of its optimizer state, and take a share of the rows.
      tensor: devices that compute every row together, each a share of heads and columns.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"mesh.{name}={value!r}: expected an integer of at least 1")

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def row_shares(self) -> int:
        """Devices that a batch's rows are dealt out over."""
        return self.data * self.fsdp

    def check_devices(self) -> None:
        """Raises UserError where there are fewer devices than the mesh asks for."""
        if self.devices > (found := len(jax.devices())):
            asked = " x ".join(f"{name} {getattr(self, name)}" for name in AXES)
            raise UserError(f"mesh: {asked} asks for {self.devices} devices, found {found}")


def logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """The names of a decoder parameter's axes; None for an axis that has none, as those of norms.

    Args:
      name: dotted path, such as "layers.mlp.up_proj.kernel" or "layers.self_attn.q_proj.lora.a". An adapter's A has the
        inputs of its matrix, its B the outputs.
    """
    *path, leaf = name.split(".")
    inputs, outputs = _MATRICES.get(path[-2] if path[-1] == "lora" else path[-1], (None, None))
    own: tuple[str | None, ...] = {
        "embedding": ("vocab", "embed"),
        "kernel": (inputs, outputs),
        "bias": (outputs,),
        "a": (inputs, "rank"),
        "b": ("rank", outputs),
    }.get(leaf, ())
    stacks = [] if path[0] != "layers" else ["layer"]
    if "moe" in path:
        stacks.append("expert")
    if path[-1] == "lora":
        stacks.append("adapter")
    stacked = tuple(stacks[: max(0, ndim - len(own))])
    return (*stacked, *(None,) * (ndim - len(own) - len(stacked)), *own)


class Layout:
    """The places of a job's arrays on its mesh.

    Args:
      config: the mesh.
      model: whose heads are never cut in two.
      params: every parameter by dotted path, trainable or not; only shapes are looked at.

    Attributes:
      uncut: "name of an axis (its size)" -> the mesh axis that should have cut it and does not divide it; it lies whole
        on every device.

    Raises:
      UserError: fewer devices than the mesh asks for.
    """

    def __init__(self, config: MeshConfig, model: DecoderConfig, params: Mapping[str, Any]):
        config.check_devices()
        self.config = config
        self._lengths = dataclasses.asdict(config)
        self._units = {"heads": model.num_heads, "kv": model.num_kv_heads}
        devices = jax.devices()[: config.devices]
        self._one = devices[0] if config.devices == 1 else None
        # Axes of type Auto: XLA propagates what is not said.
        self.mesh = Mesh(np.array(devices).reshape([self._lengths[name] for name in AXES]), AXES)
        self.uncut: dict[str, str] = {}
        self._specs = {name: (tuple(p.shape), self._spec(name, tuple(p.shape))) for name, p in params.items()}

    @property
    def alone(self) -> bool:
        """Whether the mesh is a single device."""
        return self._one is not None

    def _spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        cuts: list[str | None] = []
        for axis, size in zip(logical_axes(name, len(shape)), shape):
            cut = RULES[axis] if axis is not None else None
            if cut is not None and (size % self._lengths[cut] or self._units.get(axis or "", 0) % self._lengths[cut]):
                self.uncut[f"{axis} ({self._units.get(axis or '', size)})"] = f"{cut}={self._lengths[cut]}"
                cut = None
            cuts.append(cut)
        return PartitionSpec(*cuts)

    def sharding(self, spec: PartitionSpec) -> NamedSharding | SingleDeviceSharding:
        """A place on the mesh; on one device simply that device."""
        return NamedSharding(self.mesh, spec) if self._one is None else SingleDeviceSharding(self._one)

    def shardings(self, tree: Any) -> Any:
        """The place of every array of a tree of parameters, gradients or optimizer state.

        An array that stands under a parameter's name and has its shape lies where the parameter does; any other, such
        as a count or a factored moment, is whole everywhere.
        """

        def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding | SingleDeviceSharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            shape, spec = self._specs.get(names[-1] if names else "", ((), PartitionSpec()))
            return self.sharding(spec if tuple(leaf.shape) == shape else PartitionSpec())

        return jax.tree_util.tree_map_with_path(of, tree)

    def put(self, tree: Tree) -> Tree:
        """A tree of parameters or optimizer state, laid out."""
        return jax.device_put(tree, self.shardings(tree))

    def put_batch(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """A batch [rows, ...], its rows dealt out."""
        return jax.device_put(dict(batch), self.sharding(PartitionSpec(_ROWS)))

    def gathered(self, tree: Tree, device: jax.Device | None = None) -> Tree:
        """A tree with every array whole on one device, by default the host's; as it is where there is only one."""
        if self._one is not None:
            return tree
        return jax.device_put(tree, device or host_device())

    def pin(self, tree: Tree) -> Tree:
        """Inside jit: a tree of parameters, gradients or optimizer state stays laid out."""
        return tree if self._one is not None else jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def pin_rows(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """Inside jit: an array of rows, or of rows' tokens, is dealt out along `axis` and whole along the others."""
        if self._one is not None:
            return x
        spec = PartitionSpec(*(_ROWS if i == axis else None for i in range(x.ndim)))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def pin_table(self, table: Float[Array, "V D"]) -> Float[Array, "V D"]:
        """Inside jit: an embedding, cut by fsdp where it is stored, has whole vectors where they are looked up."""
        if self._one is not None:
            return table
        cut = self._specs["embed.embedding"][1][0]
        return jax.lax.with_sharding_constraint(table, NamedSharding(self.mesh, PartitionSpec(cut, None)))

    def describe(self) -> str:
        """One line for people."""
        sizes = " x ".join(f"{name} {self._lengths[name]}" for name in AXES)
        whole = "".join(f"; {axis} not cut by {cut}" for axis, cut in self.uncut.items())
        return f"mesh: {math.prod(self._lengths.values())} devices, {sizes}{whole}"


def host_device() -> jax.Device:
    """The host's memory, where a model too large for one device is loaded and gathered; the first device where JAX was
    told to use no CPU.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]
