"""Texts to unit vectors: one protocol, and two embedders that need no weights. `encoder.py` has one with.

Similarities of different embedders mean different things: what is learned of one does not hold for another, so every
embedder has an id, which is stored with each vector.
"""

import functools
import hashlib
import itertools
import math
import re
import threading
import unicodedata
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx
import numpy as np
import openai
from jaxtyping import Float, Int

from jaxstack.runtime.errors import UserError


class Embedder(Protocol):
    """Texts to vectors of length one. The same text always gives the same vector.

    Attributes:
      id: names the model and its version: vectors of equal ids may be compared.
      dim: of the vectors.
    """

    id: str
    dim: int

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Unit rows, float32; a text of which nothing is known gives zeros."""
        ...


# ------------------------------------------------------------------------------------------------------ hashed n-grams

# Words that say little, and the share of English questions that hold them, roughly: what a word weighs before any text
# has been counted. All others are taken to be rare.
_COMMON: Mapping[float, str] = {
    0.5: "the a is of to what how i in",
    0.25: "do you for and my me can it on with are that this be an",
    0.1: (
        "if or from at as by there have has does did was were will would should could may might your we our us they "
        "them their he she his her its not no so but about which who when where why please thanks thank hi hello hey"
    ),
    0.05: (
        "get give tell show make want need know way best good any some much many more most like just use using up out "
        "into than then also all one find help let say see here am been being had go think t s m re ve ll d"
    ),
}
_PSEUDO_DOCUMENTS = 200
_WORD = re.compile(r"\w+", re.UNICODE)
_PAIR_WEIGHT, _GRAM_WEIGHT = 0.5, 0.6
_REMEMBERED_WORDS = 65_536
# Letters of a word that is remembered; longer ones (tokens, data, languages without spaces) hardly come again, and what
# is to be remembered of them grows with their length.
_LONGEST_REMEMBERED = 24


class HashedNgramEmbedder:
    """The default, without a download: words, pairs of words and their letters, hashed into signed buckets.

    It is lexical: good with typos, word order and templates, blind to synonyms. A word weighs (1 + log count) * idf,
    where idf comes from how many texts hold it; before any have been counted, from a short list of common English
    words. A word's letters (its 3-grams, with its ends) share its weight, so that misspelt words still meet.

    An embedder never changes: `count` gathers texts, and `recounted` returns the next version, with an id of its own,
    for whoever embeds all entries anew.

    Args:
      dim: buckets.
      documents: texts counted so far.
      counts: of these, how many hold a word.
    """

    def __init__(self, dim: int = 1024, *, documents: int = 0, counts: Mapping[str, int] | None = None):
        if dim < 16:
            raise UserError(f"dim: found {dim}, expected at least 16")
        self.dim = dim
        self._documents, self._counts = documents, dict(counts or {})
        self.id = f"hashed-ngrams-1:{dim}:{_digest_of(documents, self._counts)}"
        self._waiting: Counter[str] = Counter()
        self._waiting_documents = 0
        self._lock = threading.Lock()
        # Per instance: both depend on the counts.
        self._remembered_word = functools.lru_cache(_REMEMBERED_WORDS)(self._word_features)
        self._remembered_pair = functools.lru_cache(_REMEMBERED_WORDS)(self._pair_features)

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Unit rows, float32. About 0.05 ms a question."""
        out = np.zeros((len(texts), self.dim), dtype=np.float64)
        for row, text in zip(out, texts, strict=True):
            words = _words(text)
            for word, times in Counter(words).items():
                buckets, values = self._word(word)
                np.add.at(row, buckets, (1 + math.log(times)) * values)
            for pair, times in Counter(itertools.pairwise(words)).items():
                buckets, values = self._pair(*pair)
                np.add.at(row, buckets, (1 + math.log(times)) * values)
        norms = np.linalg.norm(out, axis=1, keepdims=True)
        return (out / np.maximum(norms, 1e-30)).astype(np.float32)

    def count(self, texts: Sequence[str]) -> None:
        """Counts the words of texts, for a later version. Any thread may call it."""
        with self._lock:
            for text in texts:
                self._waiting.update(set(_words(text)))
            self._waiting_documents += len(texts)

    @property
    def waiting(self) -> int:
        """Texts counted that the weights do not know yet."""
        return self._waiting_documents

    def recounted(self) -> "HashedNgramEmbedder":
        """The next version, whose weights know all texts that were counted."""
        with self._lock:
            counts = Counter(self._counts) + self._waiting
            return HashedNgramEmbedder(self.dim, documents=self._documents + self._waiting_documents, counts=counts)

    def state(self) -> dict[str, Any]:
        """The arguments that make this version again; JSON values."""
        return {"dim": self.dim, "documents": self._documents, "counts": self._counts}

    def idf(self, word: str) -> float:
        """log of one over the share of texts that hold the word."""
        holding = self._counts.get(word, 0) + _PSEUDO_DOCUMENTS * _common().get(word, 0.0)
        return math.log((self._documents + _PSEUDO_DOCUMENTS + 1) / (holding + 1)) + 0.1

    def _word(self, word: str) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        known = len(word) <= _LONGEST_REMEMBERED
        return self._remembered_word(word) if known else self._word_features(word)

    def _pair(self, first: str, second: str) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        known = len(first) + len(second) <= 2 * _LONGEST_REMEMBERED
        return self._remembered_pair(first, second) if known else self._pair_features(first, second)

    def _word_features(self, word: str) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        padded = f"^{word}$"
        grams = [padded[i : i + 3] for i in range(len(padded) - 2)] if len(word) > 1 else []
        weight = self.idf(word)
        shares = [1.0, *[_GRAM_WEIGHT / math.sqrt(len(grams) or 1)] * len(grams)]
        return self._features([word, *(f"3:{gram}" for gram in grams)], weight * np.array(shares))

    def _pair_features(self, first: str, second: str) -> tuple[Int[np.ndarray, "n"], Float[np.ndarray, "n"]]:
        weight = _PAIR_WEIGHT * math.sqrt(self.idf(first) * self.idf(second))
        return self._features([f"{first} {second}"], np.array([weight]))

    def _features(
        self, names: Sequence[str], weights: Float[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "_"], Float[np.ndarray, "_"]]:
        """Two buckets for each name, with signs, so that names that meet in one are told apart by the other."""
        raw = b"".join(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=16).digest() for name in names)
        numbers = np.frombuffer(raw, dtype="<u8")
        signs = np.where(numbers >> np.uint64(63), 1.0, -1.0)
        return (numbers % np.uint64(self.dim)).astype(np.intp), signs * np.repeat(weights, 2) / math.sqrt(2)


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


@functools.cache
def _common() -> dict[str, float]:
    return {word: share for share, words in _COMMON.items() for word in words.split()}


def _digest_of(documents: int, counts: Mapping[str, int]) -> str:
    if not documents:
        return "0"
    digest = hashlib.blake2b(digest_size=6)
    for word in sorted(counts):
        digest.update(f"{word} {counts[word]}\n".encode())
    return f"{documents}-{digest.hexdigest()}"


# ------------------------------------------------------------------------------------------------------------ endpoints


class RemoteEmbedder:
    """Any server with OpenAI's `/v1/embeddings`. It is asked once at the start, for the width of its vectors.

    Args:
      base_url: with the "/v1".
      model: its name there.
      api_key: sent as bearer token.
      dimensions: asked for, where the model can shorten its vectors.
      batch: texts sent at once.
      max_retries: further tries of a request that found the server busy or lost.
      timeout_s: of one try.

    Raises:
      UserError: the endpoint cannot be reached, refuses, or answers with something else than vectors; also from
        `embed`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        dimensions: int | None = None,
        batch: int = 128,
        max_retries: int = 2,
        timeout_s: float = 10.0,
    ):
        self._base_url, self._model, self._batch = base_url, model, batch
        self._options: dict[str, Any] = {} if dimensions is None else {"dimensions": dimensions}
        # A proxy from the environment must not come between us and a server on this machine.
        host = urllib.parse.urlsplit(base_url).hostname
        http = openai.DefaultHttpxClient(trust_env=host not in ("127.0.0.1", "localhost", "::1"))
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key or "none", max_retries=max_retries, timeout=timeout_s, http_client=http
        )
        try:
            self.dim = self._ask(["How wide are your vectors?"]).shape[1]
        except BaseException:
            self.close()
            raise
        self.id = f"remote:{urllib.parse.urlsplit(base_url).netloc}:{model}:{self.dim}"

    def __enter__(self) -> "RemoteEmbedder":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def embed(self, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Unit rows, float32."""
        parts = [self._ask(list(texts[i : i + self._batch])) for i in range(0, len(texts), self._batch)]
        vectors = np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)
        if vectors.shape[1] != self.dim:
            raise UserError(f"{self._where}: found vectors of {vectors.shape[1]} numbers, expected {self.dim}")
        return vectors

    @property
    def _where(self) -> str:
        return f"embeddings of {self._model!r} at {self._base_url}"

    def _ask(self, texts: list[str]) -> Float[np.ndarray, "n dim"]:
        # An endpoint refuses empty texts.
        sent = [text if text.strip() else " ." for text in texts]
        try:
            answer = self._client.embeddings.create(
                model=self._model, input=sent, encoding_format="float", **self._options
            )
            rows = sorted(answer.data or (), key=lambda item: item.index)
            vectors = np.array([item.embedding for item in rows], dtype=np.float64)
        except (openai.OpenAIError, httpx.HTTPError) as error:
            raise UserError(f"{self._where}: {' '.join(str(error).split())[:300]}") from None
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{self._where}: found no vectors in the answer, expected OpenAI's form") from None
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise UserError(
                f"{self._where}: found an array of shape {vectors.shape} for {len(texts)} texts, expected finite rows"
            )
        return (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)).astype(np.float32)
