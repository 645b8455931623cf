"""`PackedWeight`: a matrix stored as column panels, the order in which the CPU kernel reads it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

PANEL_COLUMNS = 64  # `kColumns` of packed_matmul.cc


@functools.partial(jax.tree_util.register_dataclass, data_fields=("panels", "layer"), meta_fields=("out_features",))
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A `[K, N]` matrix, or a stack of `L` of them, for `matmul`; for serving only: it has no gradient.

    Panel `p` holds columns `64 p .. 64 p + 63`, all of K, contiguous; columns past `out_features` are zero.

    Attributes:
      panels: the numbers, float32. A stack has one more leading axis.
      out_features: N.
      layer: which matrix of a stack is meant; None for a single matrix, or for a stack not indexed yet.
    """

    panels: Float[Array, "*L n_panels K 64"]
    out_features: int
    layer: Int[Array, ""] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(K, N)` of the matrix meant, or `(L, K, N)` of a stack not indexed yet."""
        stack = () if self.layer is not None else self.panels.shape[:-3]
        return (*stack, self.panels.shape[-2], self.out_features)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.panels.dtype

    def at_layer(self, index: Int[Array, ""] | int) -> "PackedWeight":
        """Matrix `index` of a stack. Nothing is copied: the whole stack stays, and the kernel offsets its pointer.

        An index outside the stack means the nearest inside, as in `jax.lax.dynamic_slice`.

        Raises:
          ValueError: this is not a stack, or is indexed already.
        """
        if self.panels.ndim != 4 or self.layer is not None:
            raise ValueError(f"at_layer: expected a stack [L, K, N] not indexed yet, found shape {self.shape}")
        return dataclasses.replace(self, layer=jnp.asarray(index, jnp.int32))

    def chosen_panels(self) -> Float[Array, "*L n_panels K 64"]:
        """The panels of the matrix meant (a copy of them where `layer` is set)."""
        if self.layer is None:
            return self.panels
        return jax.lax.dynamic_index_in_dim(self.panels, self.layer, keepdims=False)

    def unpack(self) -> Float[Array, "*L K N"]:
        """The plain matrix (or stack) again."""
        return _unpack(self.chosen_panels(), self.out_features)


def pack(w: Float[Array, "*L K N"] | np.ndarray) -> PackedWeight:
    """Packs a matrix `[K, N]` or a stack `[L, K, N]`. Peak memory is the argument and the result, nothing between.

    Raises:
      ValueError: another number of axes.
      TypeError: not floating point.
    """
    return PackedWeight(_packed(_checked(w, "pack"), transposed=False), out_features=w.shape[-1])


def pack_transposed(w: Float[Array, "*L N K"] | np.ndarray) -> PackedWeight:
    """`pack` of the transpose, without forming it: an embedding table `[vocabulary, hidden]` as the output head.

    Raises:
      ValueError: another number of axes.
      TypeError: not floating point.
    """
    return PackedWeight(_packed(_checked(w, "pack_transposed"), transposed=True), out_features=w.shape[-2])


def _checked(w: Array | np.ndarray, name: str) -> Array | np.ndarray:
    if w.ndim not in (2, 3):
        raise ValueError(f"{name}: expected a matrix or a stack of matrices, found shape {tuple(w.shape)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, found {w.dtype}")
    return w


def _packed(w: Array | np.ndarray, *, transposed: bool) -> Array:
    if isinstance(w, jax.core.Tracer) or jax.default_backend() != "cpu" or 0 in w.shape:
        return _pack_traced(w, transposed=transposed)
    return _pack_on_host(np.asarray(w), transposed=transposed)


def _pack_on_host(w: np.ndarray, *, transposed: bool) -> Array:
    """Panel by panel into memory that JAX then takes over as it is; compiles nothing."""
    stack = w if w.ndim == 3 else w[None]
    if transposed:
        stack = stack.swapaxes(-1, -2)
    layers, depth, columns = stack.shape
    n_panels = -(-columns // PANEL_COLUMNS)
    panels = _empty_in_huge_pages((layers, n_panels, depth, PANEL_COLUMNS))
    for layer, panel in np.ndindex(layers, n_panels):
        part = stack[layer, :, panel * PANEL_COLUMNS : (panel + 1) * PANEL_COLUMNS]
        panels[layer, panel, :, : part.shape[1]] = part
        panels[layer, panel, :, part.shape[1] :] = 0.0
    return jnp.from_dlpack(panels if w.ndim == 3 else panels[0])


def _empty_in_huge_pages(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised float32 array that begins on a huge-page boundary.

    numpy asks Linux for huge pages for large arrays, XLA does not; without them every 4 KiB of streamed weights costs a
    page walk, 5 to 15 % of a decode step's product.
    """
    boundary = 1 << 21
    size_bytes = int(np.prod(shape)) * 4
    if size_bytes < boundary:
        boundary = 64  # what JAX needs to take the memory over without a copy
    raw = np.empty(size_bytes + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + size_bytes].view(np.float32).reshape(shape)


@functools.partial(jax.jit, static_argnames="transposed")
def _pack_traced(w: Array, *, transposed: bool) -> Array:
    # One jit: padding, cutting and moving the axis become a single pass over the weights.
    w = w.astype(jnp.float32)
    columns = w.ndim - 2 if transposed else w.ndim - 1
    padding = [(0, 0)] * w.ndim
    padding[columns] = (0, -w.shape[columns] % PANEL_COLUMNS)
    w = jnp.pad(w, padding)
    n_panels = w.shape[columns] // PANEL_COLUMNS
    w = w.reshape(*w.shape[:columns], n_panels, PANEL_COLUMNS, *w.shape[columns + 1 :])
    return jnp.swapaxes(w, -1, -2) if transposed else jnp.swapaxes(w, -2, -3)


@functools.partial(jax.jit, static_argnames="out_features")
def _unpack(panels: Array, out_features: int) -> Array:
    columns_apart = jnp.swapaxes(panels, -2, -3)
    return columns_apart.reshape(*columns_apart.shape[:-2], -1)[..., :out_features]
