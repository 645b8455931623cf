"""A mixture of experts with random weights, made fast: what a benchmark of transfers needs of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jaxstack.engine.batch import BatchShape, cut, size
from jaxstack.engine.page_store import strip
from jaxstack.models.decoder import Decoder
from jaxstack.models.decoder_config import DecoderConfig, MoeConfig
from jaxstack.runtime.memory_spaces import host_processor

# Numbers drawn for a matrix, which is then filled with repeats of them: a billion draws take longer than the benchmark.
_DRAWN = 1 << 20


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is decoded.

    Args:
      model: its sizes.
      sequences: at once, in `micro_batches` equal parts.
      context: tokens of each before.
      steps: measured.
      dtype: of weights and activations.
    """

    model: DecoderConfig
    sequences: int
    micro_batches: int
    context: int
    steps: int
    page_size: int
    dtype: str

    @property
    def table_pages(self) -> int:
        """Pages of a sequence: those to come, one warm-up step included."""
        return -(-(self.context + 2 * self.steps + 4) // self.page_size)

    @property
    def shape(self) -> BatchShape:
        return BatchShape(self.sequences, self.sequences, self.table_pages, self.sequences)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(self.dtype).itemsize

    @property
    def kv_token_bytes(self) -> int:
        """Keys and values of a token in one layer."""
        return 2 * self.model.num_kv_heads * self.model.head_dim * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """The experts of a layer."""
        assert self.model.moe is not None
        return (
            3 * self.model.hidden_size * self.model.moe.intermediate_size * self.model.moe.num_experts * self.itemsize
        )

    def ints(self, position: int, tokens: np.ndarray | None = None) -> np.ndarray:
        """A decode step of all sequences at one position, each with pages of its own."""
        shape = self.shape
        ints = np.zeros(size(shape.int_fields), np.int32)
        f, rows = cut(ints, shape.int_fields), np.arange(self.sequences)
        f["tokens"][:] = rows % self.model.vocab_size if tokens is None else tokens
        f["positions"][:] = position
        f["kv_lens"][:] = position + 1
        f["query_starts"][:] = np.arange(self.sequences + 1)
        f["num_decodes"][...] = self.sequences
        f["block_tables"][:] = np.arange(self.sequences * shape.table_pages).reshape(self.sequences, -1)
        page, offset = divmod(position, self.page_size)
        f["write_slots"][:] = f["block_tables"][:, page] * self.page_size + offset
        return ints


def mixtral(
    layers: int, *, hidden: int = 4096, inner: int = 14336, vocab: int = 32000, heads: int = 32
) -> DecoderConfig:
    """Mixtral 8x7B's shape by default, with fewer layers."""
    return DecoderConfig(
        architecture="MixtralForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 4,
        head_dim=hidden // heads,
        max_position_embeddings=32768,
        moe=MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=inner),
    )


def stripped_decoder(config: DecoderConfig, dtype: str) -> Decoder:
    """A decoder on the host without experts, its other weights random."""
    decoder = Decoder.abstract(config, param_dtype=jnp.dtype(dtype))
    strip(decoder)
    rng = np.random.default_rng(0)
    with jax.default_device(host_processor()):
        filled = [
            (path, leaf.replace(jnp.asarray(_random(leaf.get_value().shape, dtype, rng, ones="norm" in str(path)))))
            for path, leaf in nnx.to_flat_state(nnx.state(decoder))
        ]
    nnx.update(decoder, nnx.from_flat_state(filled))
    return decoder


def expert_matrices(config: DecoderConfig, dtype: str, seed: int) -> dict[str, np.ndarray]:
    """One layer's, in ordinary memory."""
    assert config.moe is not None
    rng = np.random.default_rng(seed)
    hidden, inner, experts = config.hidden_size, config.moe.intermediate_size, config.moe.num_experts
    return {
        "gate": _random((experts, hidden, inner), dtype, rng),
        "up": _random((experts, hidden, inner), dtype, rng),
        "down": _random((experts, inner, hidden), dtype, rng),
    }


def _random(shape: tuple[int, ...], dtype: str, rng: np.random.Generator, *, ones: bool = False) -> np.ndarray:
    kind = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if ones:
        return np.ones(shape, kind)
    count = int(np.prod(shape))
    scale = 0.6 / np.sqrt(shape[-2]) if len(shape) > 1 else 0.02
    # An odd number, so that no two rows are alike.
    drawn = (scale * rng.standard_normal(min(count, _DRAWN - 1), np.float32)).astype(kind)
    return np.resize(drawn, count).reshape(shape)
