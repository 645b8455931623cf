"""Prompts given as vectors: what an encoder of speech or images hands to the decoder. Plain numpy, no jax.

Cached prefixes are found by what they were computed from, so a vector is keyed by a digest of its bytes: equal vectors
share pages, different ones never do.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32

from jaxstack.runtime.errors import UserError

_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True, eq=False)
class EmbeddingPrompt:
    """A prompt whose tokens enter the decoder's first layer as vectors, wholly or in part.

    Attributes:
      embeddings: one row for each position, as the decoder's own embedding (scaled, where the model scales it) would
        be.
      token_ids: one for each position: -1 takes the row of `embeddings`, anything else is an ordinary token, whose row
        is ignored. None is -1 everywhere.
    """

    embeddings: Float[np.ndarray, "T D"]
    token_ids: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class GivenEmbeddings:
    """The vectors of a request's prompt, checked.

    Attributes:
      rows: `[T, D]`.
      used: `[T]`, where a row takes the place of the token's embedding.
      keys: `[T]`, what stands for a used row in the prefix cache: a negative number, unlike any token id.
    """

    rows: Float32[np.ndarray, "T D"]
    used: Bool[np.ndarray, " T"]
    keys: tuple[int, ...]

    def page_key(self, tokens: Sequence[int], start: int) -> tuple[int, ...]:
        """The key of the page that holds `tokens`, the first of them at position `start`."""
        key = list(tokens)
        for i in range(start, min(start + len(key), len(self.keys))):
            if self.used[i]:
                key[i - start] = self.keys[i]
        return tuple(key)


def check_embeddings(prompt: EmbeddingPrompt, hidden_size: int) -> tuple[list[int], GivenEmbeddings]:
    """The prompt's token ids, -1 where a vector stands, and its vectors.

    Raises:
      UserError: not a row of `hidden_size` finite numbers for each position.
    """
    rows = np.asarray(prompt.embeddings)
    numbers = rows.dtype.kind in "fiu" or rows.dtype.name == "bfloat16"
    if rows.ndim != 2 or rows.shape[1] != hidden_size or not numbers:
        raise UserError(
            f"prompt: found embeddings of shape {list(rows.shape)} and type {rows.dtype}, expected numbers "
            f"[tokens, {hidden_size}]"
        )
    rows = np.ascontiguousarray(rows.astype(np.float32))
    ids = [-1] * len(rows) if prompt.token_ids is None else [int(i) for i in prompt.token_ids]
    if len(ids) != len(rows):
        raise UserError(f"prompt: found {len(ids)} token ids for {len(rows)} embeddings, expected as many")
    if min(ids, default=0) < -1:
        raise UserError(f"prompt: found token id {min(ids)}, expected -1 (an embedding) or a token")
    used = np.asarray(ids, np.int64) == -1
    if not np.isfinite(rows[used]).all():
        raise UserError("prompt: found embeddings that are not finite")
    keys = tuple(_key(row) if use else 0 for row, use in zip(rows, used))
    return ids, GivenEmbeddings(rows, used, keys)


def _key(row: Float32[np.ndarray, " D"]) -> int:
    return -1 - int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=_DIGEST_BYTES).digest(), "little")
