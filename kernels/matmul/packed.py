"""`PackedWeight`: a matrix stored as column panels, the order in which the CPU kernel reads it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

PANEL_COLUMNS = 64  # `kColumns` of packed_matmul.cc


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("panels", "layer", "rows"),
    meta_fields=("in_features", "out_features"),
)
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """A `[K, N]` matrix, or a stack of `L` of them, for `matmul`; for serving only: it has no gradient.

    Panel `p` holds columns `64 p .. 64 p + 63`, all of K, contiguous; columns past `out_features` are zero. In bfloat16
    the numbers of two neighbouring k lie side by side, as the processor's dot product takes them: `[L, n_panels,
    ceil(K / 2), 64, 2]`, an odd K followed by zeros.

    Attributes:
      panels: the numbers, float32 or bfloat16. A stack has one more leading axis.
      in_features: K.
      out_features: N.
      layer: which matrix of a stack is meant; None for a single matrix, or for a stack not indexed yet.
      rows: how many of the rows it meets are multiplied; None for all.
    """

    panels: Float[Array, "*L n_panels K 64"] | Float[Array, "*L n_panels pairs 64 2"]
    in_features: int
    out_features: int
    layer: Int[Array, ""] | None = None
    rows: Int[Array, ""] | None = None

    @property
    def stacked(self) -> bool:
        """Whether `panels` are those of several matrices."""
        return self.panels.ndim == 4 + self._paired

    @property
    def shape(self) -> tuple[int, ...]:
        """`(K, N)` of the matrix meant, or `(L, K, N)` of a stack not indexed yet."""
        stack = self.panels.shape[:1] if self.stacked and self.layer is None else ()
        return (*stack, self.in_features, self.out_features)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        return self.panels.dtype

    @property
    def _paired(self) -> bool:
        return self.panels.dtype == jnp.bfloat16

    def at_layer(self, index: Int[Array, ""] | int) -> "PackedWeight":
        """Matrix `index` of a stack. Nothing is copied: the whole stack stays, and the kernel offsets its pointer.

        An index outside the stack means the nearest inside, as in `jax.lax.dynamic_slice`.

        Raises:
          ValueError: this is not a stack, or is indexed already.
        """
        if not self.stacked or self.layer is not None:
            raise ValueError(f"at_layer: expected a stack [L, K, N] not indexed yet, found shape {self.shape}")
        return dataclasses.replace(self, layer=jnp.asarray(index, jnp.int32))

    def for_rows(self, rows: Int[Array, ""] | int) -> "PackedWeight":
        """The same for products of which only the first `rows` rows count, the others being padding.

        Those rows of the result are zeros and take no time: a compiled shape then costs what is in it, not its size.
        """
        return dataclasses.replace(self, rows=jnp.asarray(rows, jnp.int32))

    def unpack(self) -> Float[Array, "*L K N"]:
        """The plain matrix (or stack) again; of a stack with `layer` set, that one matrix."""
        panels = self.panels
        if self.layer is not None:
            panels = jax.lax.dynamic_index_in_dim(panels, self.layer, keepdims=False)
        return _unpack(panels, self.in_features, self.out_features)


def pack(w: Float[Array, "*L K N"] | np.ndarray, dtype: DTypeLike = jnp.float32) -> PackedWeight:
    """Packs a matrix `[K, N]` or a stack `[L, K, N]` as float32 or bfloat16. Peak memory is the argument and the
    result, nothing between.

    Raises:
      ValueError: another number of axes, or another dtype to pack as.
      TypeError: not floating point.
    """
    _check(w, dtype, "pack")
    return PackedWeight(_packed(w, jnp.dtype(dtype), transposed=False), w.shape[-2], w.shape[-1])


def pack_transposed(w: Float[Array, "*L N K"] | np.ndarray, dtype: DTypeLike = jnp.float32) -> PackedWeight:
    """`pack` of the transpose, without forming it: an embedding table `[vocabulary, hidden]` as the output head.

    Raises:
      ValueError: another number of axes, or another dtype to pack as.
      TypeError: not floating point.
    """
    _check(w, dtype, "pack_transposed")
    return PackedWeight(_packed(w, jnp.dtype(dtype), transposed=True), w.shape[-1], w.shape[-2])


def _check(w: Array | np.ndarray, dtype: DTypeLike, name: str) -> None:
    if w.ndim not in (2, 3):
        raise ValueError(f"{name}: expected a matrix or a stack of matrices, found shape {tuple(w.shape)}")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{name}: expected floating point, found {w.dtype}")
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"{name}: dtype: found {jnp.dtype(dtype)}, expected float32 or bfloat16")


def _packed(w: Array | np.ndarray, dtype: jnp.dtype, *, transposed: bool) -> Array:
    if isinstance(w, jax.core.Tracer) or jax.default_backend() != "cpu" or 0 in w.shape:
        return _pack_traced(w, dtype, transposed=transposed)
    return _pack_on_host(np.asarray(w), dtype, transposed=transposed)


def _pack_on_host(w: np.ndarray, dtype: jnp.dtype, *, transposed: bool) -> Array:
    """Panel by panel into memory that JAX then takes over as it is; compiles nothing."""
    stack = w if w.ndim == 3 else w[None]
    if transposed:
        stack = stack.swapaxes(-1, -2)
    layers, depth, columns = stack.shape
    n_panels = -(-columns // PANEL_COLUMNS)
    per_word = 4 // dtype.itemsize
    words = _empty_in_huge_pages((layers, n_panels, -(-depth // per_word), PANEL_COLUMNS))
    for layer, panel in np.ndindex(layers, n_panels):
        part = stack[layer, :, panel * PANEL_COLUMNS : (panel + 1) * PANEL_COLUMNS].astype(dtype)
        to, used = words[layer, panel], part.shape[1]
        to[:, used:] = 0
        if per_word == 1:
            to[:, :used] = part.view(np.uint32)
        else:
            bits = part.view(np.uint16)
            to[:, :used] = bits[0::2]  # the lower half of a word, as the processor counts: the first of the two
            to[: depth // 2, :used] |= bits[1::2].astype(np.uint32) << 16
    panels = words.view(dtype)
    if per_word > 1:
        panels = panels.reshape(*words.shape, per_word)
    # Not jnp.asarray: that copies bfloat16.
    return jax.device_put(panels if w.ndim == 3 else panels[0], may_alias=True)


def _empty_in_huge_pages(shape: tuple[int, ...]) -> np.ndarray:
    """An uninitialised array of 32-bit words that begins on a huge-page boundary.

    numpy asks Linux for huge pages for large arrays, XLA does not; without them every 4 KiB of streamed weights costs a
    page walk, 5 to 15 % of a decode step's product.
    """
    boundary = 1 << 21
    size_bytes = int(np.prod(shape)) * 4
    if size_bytes < boundary:
        boundary = 64  # what JAX needs to take the memory over without a copy
    raw = np.empty(size_bytes + boundary, np.uint8)
    start = -raw.ctypes.data % boundary
    return raw[start : start + size_bytes].view(np.uint32).reshape(shape)


@functools.partial(jax.jit, static_argnames=("dtype", "transposed"))
def _pack_traced(w: Array, dtype: jnp.dtype, *, transposed: bool) -> Array:
    # One jit: padding, cutting and moving the axis become a single pass over the weights.
    w = w.astype(dtype)
    if transposed:
        w = jnp.swapaxes(w, -1, -2)
    per_word = 4 // dtype.itemsize
    *stack, depth, columns = w.shape
    w = jnp.pad(w, [*[(0, 0)] * len(stack), (0, -depth % per_word), (0, -columns % PANEL_COLUMNS)])
    w = w.reshape(*stack, -(-depth // per_word), per_word, -(-columns // PANEL_COLUMNS), PANEL_COLUMNS)
    w = jnp.moveaxis(w, (-2, -4, -1, -3), (-4, -3, -2, -1))
    return w if per_word > 1 else w[..., 0]


@functools.partial(jax.jit, static_argnames=("in_features", "out_features"))
def _unpack(panels: Array, in_features: int, out_features: int) -> Array:
    if panels.dtype == jnp.bfloat16:
        # [.., n_panels, pairs, 64, 2] to [.., pairs, 2, n_panels, 64]
        panels = jnp.moveaxis(panels, (-4, -3, -2, -1), (-2, -4, -1, -3))
        panels = panels.reshape(*panels.shape[:-4], -1, *panels.shape[-2:])
    else:
        panels = jnp.swapaxes(panels, -2, -3)
    return panels.reshape(*panels.shape[:-2], -1)[..., :in_features, :out_features]
