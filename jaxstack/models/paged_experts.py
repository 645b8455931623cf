"""Feed-forward weights in pages: what one transfer brings from host memory, and what one product computes with.

A page is a few neighbouring experts of one layer, or a range of one expert's inner features: columns of its gate and up
projections with the rows of its down projection that meet them. An expert's output is the sum over its ranges,

    y = sum_c down[c] (activation(gate[:, c] x) * up[:, c] x)

so each page does its part by itself, wherever it has arrived. The parts are added in the order of the pages, in
float32, never in that of arrival: which pages had to be brought changes no bit. A plain MLP is one expert that every
token goes through.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.models.activations import ACTIVATIONS
from jaxstack.models.decoder_config import DecoderConfig, MoeConfig
from jaxstack.models.linear import Linear
from jaxstack.models.moe import route
from kernels.grouped_matmul import grouped_matmul
from kernels.platforms import platform

# So many rows are multiplied by a matrix in about the time in which the matrix is read: up to here it is no slower to
# give every expert all rows than to sort them.
_FREE_ROWS, _FREE_ROWS_CPU = 256, 16

# The inner features of a page: a multiple of this if the model's can be cut so.
_WHOLE = 128


class ExpertPage(NamedTuple):
    """One page: gate and up side by side, and down."""

    gate_up: Float[Array, "experts D two_chunks"]
    down: Float[Array, "experts chunk D"]


@dataclass(frozen=True)
class PageLayout:
    """How one kind of layer is cut into pages.

    Attributes:
      hidden: features of a token.
      inner: features inside one expert.
      experts: of a layer; 1 for a plain MLP.
      experts_per_page: divides `experts`; 1 where `chunks` is not.
      chunks: ranges of an expert's inner features; divides `inner`.
    """

    hidden: int
    inner: int
    experts: int
    experts_per_page: int = 1
    chunks: int = 1

    def __post_init__(self) -> None:
        if self.experts % self.experts_per_page or self.inner % self.chunks:
            raise ValueError(f"{self}: expected whole pages")
        if self.experts_per_page > 1 and self.chunks > 1:
            raise ValueError(f"{self}: expected either several experts a page or several pages an expert")

    @property
    def pages(self) -> int:
        """Of a layer."""
        return self.experts // self.experts_per_page * self.chunks

    @property
    def shapes(self) -> ExpertPage:
        """Those of a page's two arrays."""
        inner, group = self.inner // self.chunks, self.experts_per_page
        return ExpertPage((group, self.hidden, 2 * inner), (group, inner, self.hidden))  # type: ignore[arg-type]

    @property
    def page_elements(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def first_expert(self, page: int) -> int:
        return page // self.chunks * self.experts_per_page

    def cut(
        self, gate: np.ndarray, up: np.ndarray, down: np.ndarray, page: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """A page's part of a layer's matrices, views of them: gate's and up's columns, and down's rows.

        Args:
          gate, up: `[experts, D, inner]`.
          down: `[experts, inner, D]`.
        """
        first, inner = self.first_expert(page), self.inner // self.chunks
        group = slice(first, first + self.experts_per_page)
        part = slice(page % self.chunks * inner, (page % self.chunks + 1) * inner)
        return (gate[group, :, part], up[group, :, part]), down[group, part]


def choose_layouts(config: DecoderConfig, pages: int) -> dict[bool, PageLayout]:
    """A layout for each kind of layer that a model has (True: with experts), of about `pages` pages a layer, and no
    fewer where the model can be cut so.
    """
    layouts = {}
    if config.dense_layers:
        inner = config.intermediate_size
        layouts[False] = PageLayout(config.hidden_size, inner, 1, 1, _chunks(inner, pages))
    if config.moe is not None and config.sparse_layers:
        experts, inner = config.moe.num_experts, config.moe.intermediate_size
        if experts >= pages:
            group = max(g for g in range(1, experts // pages + 1) if experts % g == 0)
            layouts[True] = PageLayout(config.hidden_size, inner, experts, group, 1)
        else:
            layouts[True] = PageLayout(config.hidden_size, inner, experts, 1, _chunks(inner, -(-pages // experts)))
    return layouts


def _chunks(inner: int, least: int) -> int:
    """The smallest number of equal ranges, at least `least` of them, of whole tiles if there is one."""
    for multiple in (_WHOLE, 1):
        for chunks in range(least, inner // multiple + 1):
            if inner % (chunks * multiple) == 0:
                return chunks
    return inner


def paged_moe(
    x: Float[Array, "... D"],
    router: Linear,
    pages: Sequence[ExpertPage],
    layout: PageLayout,
    moe: MoeConfig,
    activation: str,
) -> Float[Array, "... D"]:
    """What `Moe` computes, its experts given as `layout.pages` pages."""
    rows = x.reshape(-1, x.shape[-1])
    weights, experts = route(router(rows), moe)
    if rows.shape[0] <= (_FREE_ROWS_CPU if platform() == "cpu" else _FREE_ROWS):
        chosen = experts[..., None] == jnp.arange(moe.num_experts)
        shares = jnp.sum(jnp.where(chosen, weights[..., None], 0.0), axis=1)
        return _every_row(rows, shares, pages, layout, activation).reshape(x.shape)

    chosen, k = experts.reshape(-1), moe.experts_per_token
    order = jnp.argsort(chosen, stable=True)
    sizes = jnp.sum(chosen[:, None] == jnp.arange(moe.num_experts), axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    # What a page's experts are given at most: a row once by each.
    most = min(chosen.size, rows.shape[0] * layout.experts_per_page)
    padded = jnp.pad(rows[order // k], ((0, most), (0, 0)))
    total = jnp.zeros((chosen.size + most, rows.shape[1]), jnp.float32)
    for number, page in enumerate(pages):
        first, group = layout.first_expert(number), layout.experts_per_page
        own = sizes[first : first + group]
        some = jax.lax.dynamic_slice_in_dim(padded, starts[first], most)
        gate, up = jnp.split(grouped_matmul(some.astype(page.gate_up.dtype), page.gate_up, own), 2, axis=-1)
        part = grouped_matmul(ACTIVATIONS[activation](gate) * up, page.down, own)  # zeros in rows of nobody here
        before = jax.lax.dynamic_slice_in_dim(total, starts[first], most)
        total = jax.lax.dynamic_update_slice_in_dim(total, before + part, starts[first], axis=0)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), unique_indices=True)
    parts = total[back].reshape(*experts.shape, -1)
    return jnp.sum(parts * weights[..., None], axis=1).astype(x.dtype).reshape(x.shape)


def paged_mlp(
    x: Float[Array, "... D"], pages: Sequence[ExpertPage], layout: PageLayout, activation: str
) -> Float[Array, "... D"]:
    """What `MLP` computes, its matrices given as `layout.pages` pages. No biases."""
    rows = x.reshape(-1, x.shape[-1])
    return _every_row(rows, None, pages, layout, activation).reshape(x.shape)


def _every_row(
    rows: Float[Array, "rows D"],
    shares: Float[Array, "rows E"] | None,
    pages: Sequence[ExpertPage],
    layout: PageLayout,
    activation: str,
) -> Float[Array, "rows D"]:
    """All rows through all experts, weighted by `shares`, of which most are 0; None for 1 everywhere."""
    total = jnp.zeros(rows.shape, jnp.float32)
    for number, page in enumerate(pages):
        for i in range(layout.experts_per_page):
            gate, up = jnp.split(rows.astype(page.gate_up.dtype) @ page.gate_up[i], 2, axis=-1)
            part = jnp.matmul(ACTIVATIONS[activation](gate) * up, page.down[i], preferred_element_type=jnp.float32)
            if shares is not None:
                # A row that was not given to the expert may have any value there, an infinite one too.
                share = shares[:, layout.first_expert(number) + i, None]
                part = jnp.where(share > 0, part * share, 0.0)
            total = total + part
    return total.astype(rows.dtype)
