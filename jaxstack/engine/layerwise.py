"""The forward pass of a step in pieces, so that something may happen between them: weights or keys and values brought
from elsewhere, attention computed elsewhere.

    embed -> for each layer: before attention -> attention -> after attention -> head

A piece takes the weights and the number of its layer as arguments, so that it is compiled once and not once per layer.
The pieces together compute what the ordinary runner's one program does. They are plain functions of arrays, to be
jitted by whoever runs them; each is for one `BatchShape` and takes the step's integers as `batch.py` packs them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxstack.engine.batch import BatchShape, cut
from jaxstack.models.attention import FULL_WINDOW
from jaxstack.models.decoder import Decoder, DecoderLayer, layer_at, rotation_kinds, rotation_tables
from jaxstack.models.paged_experts import ExpertPage, PageLayout, paged_mlp, paged_moe
from jaxstack.models.serving_layout import count_rows
from kernels.kv_write import kv_write
from kernels.paged_attention import Implementation, paged_attention, ragged


class LayerNumbers(NamedTuple):
    """What a piece is told of its layer, int32 scalars.

    Attributes:
      index: from 0.
      within_kind: how many before it are of its kind, with experts or without.
      window: as `jaxstack.models.attention.LayerContext` has it.
      rotation: which of the model's kinds of rotation.
    """

    index: Any
    within_kind: Any
    window: Any
    rotation: Any


class Layerwise:
    """The pieces of one decoder.

    Args:
      decoder: in serving form; without the feed-forward matrices of layers whose kind is in `layouts`, which come as
        pages instead (`jaxstack.engine.memory.weight_pages`).
      dtype: of activations.
      vocab_size: token ids at or beyond it have logits of -inf.
      layouts: how layers with experts (True) and without (False) are cut into pages; {} for no pages.

    Attributes:
      weights: what every piece takes first.
      layers: the numbers of each layer, as numpy scalars.
      sparse: whether each layer has experts: `after` needs a program of its own for either.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        dtype: jnp.dtype,
        vocab_size: int,
        layouts: Mapping[bool, PageLayout] | None = None,
    ):
        self.config = config = decoder.config
        self.dtype, self.vocab_size = jnp.dtype(dtype), vocab_size
        self.layouts = dict(layouts or {})
        self._graph: nnx.GraphDef
        self._graph, self.weights = nnx.split(decoder)
        sparse = set(config.sparse_layers)
        self.sparse = tuple(i in sparse for i in range(config.num_layers))
        self.layers = tuple(
            LayerNumbers(
                *(np.int32(n) for n in (i, self.sparse[:i].count(self.sparse[i]), window or FULL_WINDOW, kind))
            )
            for i, (window, kind) in enumerate(zip(config.layer_windows, rotation_kinds(config)))
        )

    def embed(
        self,
        shape: BatchShape,
        weights: Any,
        ints: Int[Array, " n"],
        last_token: Int[Array, " slots"],
        given: Float[Array, "rows D"] | None = None,
    ) -> tuple[Float[Array, "rows D"], Float[Array, "kinds rows half"], Float[Array, "kinds rows half"]]:
        """The tokens' vectors (those drawn last come from `last_token`, vectors in their place from `given`), and cos
        and sin of each kind of rotation.
        """
        f = cut(ints, shape.int_fields)
        known = f["tokens"]
        tokens = jnp.where(known >= 0, known, last_token[jnp.maximum(-1 - known, 0)])
        x = nnx.merge(self._graph, weights).embed(tokens, self.dtype)
        if given is not None:
            x = jnp.where((f["use_embeddings"] > 0)[:, None], given.astype(x.dtype), x)
        cos, sin = (jnp.stack(tables) for tables in zip(*rotation_tables(self.config, f["positions"])))
        return x, cos, sin

    def before(
        self,
        shape: BatchShape,
        weights: Any,
        layer: LayerNumbers,
        ints: Int[Array, " n"],
        x: Float[Array, "rows D"],
        cos: Float[Array, "kinds rows half"],
        sin: Float[Array, "kinds rows half"],
    ) -> tuple[Float[Array, "rows H hd"], Float[Array, "rows KV hd"], Float[Array, "rows KV hd"]]:
        """A layer's queries, keys and values, rotated. The same program serves layers of either kind."""
        f = cut(ints, shape.int_fields)
        module = self._layer(weights, layer, sparse=self.sparse[0], rows=f["query_starts"][-1])
        return module.before_attention(x, cos[layer.rotation], sin[layer.rotation], f["adapters"])

    def attention(
        self,
        shape: BatchShape,
        cache: Float[Array, "layers pages page_size kv_heads_2 hd"],
        layer: LayerNumbers,
        ints: Int[Array, " n"],
        q: Float[Array, "rows H hd"],
        k: Float[Array, "rows KV hd"],
        v: Float[Array, "rows KV hd"],
        *,
        cache_layer: Int[Array, ""] | None = None,
        staged_pages: Float[Array, "staged page_size kv_heads_2 hd"] | None = None,
        implementation: Implementation | None = None,
    ) -> tuple[Float[Array, "rows H hd"], Float[Array, "layers pages page_size kv_heads_2 hd"]]:
        """What the queries find, and the cache with the new keys and values in it. Needs no weights: donate the cache.

        Args:
          cache_layer: where the layer is in `cache`; None for its own number.
          staged_pages: more pages of this layer, as `kernels.paged_attention` has it.
          implementation: of `kernels.paged_attention`.
        """
        f = cut(ints, shape.int_fields)
        batch = ragged(f["block_tables"], f["kv_lens"], f["query_starts"], f["num_decodes"], rows=shape.rows)
        options: dict[str, Any] = {"scale": self.config.attention_scale, "implementation": implementation}
        if staged_pages is not None:
            options["staged_pages"] = staged_pages
        if self.config.attention_softcap is not None:
            options["softcap"] = self.config.attention_softcap
        at = layer.index if cache_layer is None else cache_layer
        cache = kv_write(cache, k, v, at, f["write_slots"])
        return paged_attention(q, cache, at, batch, window=layer.window, **options), cache

    def after(
        self,
        shape: BatchShape,
        weights: Any,
        layer: LayerNumbers,
        ints: Int[Array, " n"],
        x: Float[Array, "rows D"],
        out: Float[Array, "rows H hd"],
        pages: Sequence[ExpertPage] = (),
        *,
        sparse: bool,
    ) -> Float[Array, "rows D"]:
        """What the layer makes of `x`. `pages` in their order, for a kind of layer that has a layout."""
        config, layout = self.config, self.layouts.get(sparse)
        f = cut(ints, shape.int_fields)
        module = self._layer(weights, layer, sparse=sparse, rows=f["query_starts"][-1])

        def paged(h: Float[Array, "rows D"]) -> tuple[Float[Array, "rows D"], None]:
            assert layout is not None
            if not sparse:
                return paged_mlp(h, pages, layout, config.activation), None
            assert module.moe is not None and config.moe is not None
            return paged_moe(h, module.moe.router, pages, layout, config.moe, config.activation), None

        return module.after_attention(x, out, f["adapters"], None if layout is None else paged)[0]

    def head(
        self, shape: BatchShape, weights: Any, ints: Int[Array, " n"], x: Float[Array, "rows D"]
    ) -> tuple[Float[Array, "samples vocab"], Float[Array, "rows D"]]:
        """float32 logits of each sequence's last row, padded to `shape.samples`, and the final hidden states of all."""
        f, decoder = cut(ints, shape.int_fields), nnx.merge(self._graph, weights)
        hidden = decoder.final_norm(x)
        starts = f["query_starts"]
        count_rows(decoder.lm_head, (starts[1:] > starts[:-1]).sum())
        last = jnp.maximum(starts[1:] - 1, 0)
        logits = self.logits(decoder, hidden if shape.decode else hidden[last])
        return jnp.pad(logits, ((0, shape.samples - shape.sequences), (0, 0))), hidden

    def logits(self, decoder: Decoder, hidden: Float[Array, "rows D"]) -> Float[Array, "rows vocab"]:
        """float32, -inf for ids that no token has."""
        logits = decoder.logits(hidden)
        if logits.shape[-1] > self.vocab_size:
            logits = jnp.where(jnp.arange(logits.shape[-1]) < self.vocab_size, logits, -jnp.inf)
        return logits

    def merged(self, weights: Any) -> Decoder:
        """The decoder again, inside a program that was given its weights."""
        return nnx.merge(self._graph, weights)

    def _layer(self, weights: Any, layer: LayerNumbers, *, sparse: bool, rows: Int[Array, ""]) -> DecoderLayer:
        layers = nnx.merge(self._graph, weights).layers
        count_rows(layers, rows)
        return layer_at(layers, layer.index, layer.within_kind, sparse=sparse)


def split_step(
    ints: np.ndarray, shape: BatchShape, parts: Sequence[BatchShape], *, scrap_slot: int
) -> list[np.ndarray]:
    """A step's integers cut into micro-batches: the first rows, the next, and so on, `parts[i].rows` each.

    A sequence whose rows are cut apart is in several: each sees the keys and values that those before it have written,
    if they do so first. Rows beyond the step's own write to `scrap_slot`.
    """
    whole = cut(ints, shape.int_fields)
    starts = whole["query_starts"]
    out, first = [], 0
    for part in parts:
        mine = np.zeros(sum(int(np.prod(s)) for s in part.int_fields.values()), np.int32)
        f = cut(mine, part.int_fields)
        f["write_slots"][:] = scrap_slot
        end = min(first + part.rows, shape.rows)
        for name in ("tokens", "positions", "write_slots", "adapters", "use_embeddings"):
            f[name][: max(0, end - first)] = whole[name][first:end]
        begins, ends = np.clip(starts[:-1], first, end), np.clip(starts[1:], first, end)
        (here,) = np.nonzero(ends > begins)
        f["block_tables"][: len(here)] = whole["block_tables"][here]
        f["kv_lens"][: len(here)] = (whole["kv_lens"] - (starts[1:] - ends))[here]
        f["query_starts"][1 : len(here) + 1] = ends[here] - first
        f["query_starts"][len(here) + 1 :] = ends[here[-1]] - first if len(here) else 0
        f["num_decodes"][...] = np.count_nonzero(here < whole["num_decodes"])
        out.append(mine)
        first += part.rows
    return out


def micro_shapes(shape: BatchShape, count: int) -> list[BatchShape]:
    """At most `count` micro-batches of equal shape that hold a step."""
    rows = -(-shape.rows // min(count, shape.rows))
    if shape.decode:
        part = BatchShape(rows, rows, shape.table_pages, rows)
    else:
        sequences = min(shape.sequences, rows)
        part = BatchShape(rows, sequences + (sequences == rows), shape.table_pages, sequences)
    return [part] * -(-shape.rows // rows)
