"""A decoder small enough for every test, and packed batches for it."""

import jax.numpy as jnp
import numpy as np

from jaxstack.models import Decoder, DecoderConfig
from jaxstack.training.data import DataReport, Example, TokenizedDataset
from jaxstack.training.initialize import fresh_decoder
from jaxstack.training.packing import fill_rows

CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    qk_norm=True,
    eos_token_ids=(2,),
    initializer_range=0.2,
    # One layer with a window shorter than most documents: positions that run on across documents would show.
    layer_windows=(6, None),
)


def decoder(config: DecoderConfig = CONFIG, seed: int = 0) -> Decoder:
    return fresh_decoder(config, seed=seed)


def examples(count: int, *, seed: int = 0, longest: int = 20, vocab: int = CONFIG.vocab_size) -> list[Example]:
    """Random documents of 3..longest tokens, the first third of each not trained."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(3, longest + 1))
        made.append(Example(rng.integers(0, vocab, length).astype(np.int32), np.arange(length) >= length // 3))
    return made


def dataset(items: list[Example]) -> TokenizedDataset:
    offsets = np.concatenate([[0], np.cumsum([len(e.token_ids) for e in items])]).astype(np.int64)
    ids, masks = (np.concatenate([getattr(e, name) for e in items]) for name in ("token_ids", "loss_mask"))
    return TokenizedDataset(ids, masks, offsets, DataReport())


def batch(items: list[Example], rows: list[list[int]], length: int, row_count: int | None = None) -> dict:
    """Device arrays of the given examples in the given rows."""
    filled = fill_rows(dataset(items), rows, row_count or len(rows), length)
    return {k: jnp.asarray(v) for k, v in filled.items()}
