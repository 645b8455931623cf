"""The flags of every launcher that loads an engine."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine import Engine, EngineConfig
from jaxstack.engine.live import step_shapes
from jaxstack.engine.scheduling import POLICIES
from jaxstack.engine.scheduling.trace import TraceRecorder
from jaxstack.models.embedded import embedded_model
from jaxstack.serving import EngineModel
from launch import job

_DEFAULT = EngineConfig()

MODEL = flags.DEFINE_string("model", None, "model folder; by default the embedded Countdown model")
_WINDOW = flags.DEFINE_integer("max_model_len", None, "prompt and answer together, tokens; by default the model's own")
_PAGE = flags.DEFINE_integer("page_size", _DEFAULT.page_size, "tokens in a page of the KV cache, a power of two")
_PAGES = flags.DEFINE_integer("pages", None, "pages of the KV cache; by default chosen from the free memory")
_SEQUENCES = flags.DEFINE_integer("max_sequences", _DEFAULT.max_sequences, "answers generated at once")
_BATCH = flags.DEFINE_integer("max_batch_tokens", _DEFAULT.max_batch_tokens, "tokens computed in one step")
_POLICY: Any = flags.DEFINE_enum(
    "policy",
    _DEFAULT.policy,
    list(POLICIES),
    "who goes next: fcfs by arrival, lpm the longest cached prefix, vtc the client that has had least, dlpm the "
    "longest cached prefix among clients with credit, which is fair and keeps locality",
)
_QUANTUM = flags.DEFINE_integer(
    "quantum", None, "dlpm's credit at a time, in prompt tokens; by default it goes by what recent requests cost"
)
_WEIGHTS = flags.DEFINE_list("client_weights", [], "shares of clients: NAME=WEIGHT,NAME=WEIGHT; of others 1")
_RESERVE = flags.DEFINE_bool(
    "reserve_pages", _DEFAULT.reserve_pages, "start a request only if the pages of its longest answer are free too"
)
_WAITING = flags.DEFINE_integer("max_waiting", _DEFAULT.max_waiting, "requests that may wait for their first step")
_DTYPE: Any = flags.DEFINE_enum("dtype", _DEFAULT.dtype, ["auto", "float32", "bfloat16"], "of weights and cache")
_CACHING = flags.DEFINE_bool("prefix_caching", _DEFAULT.prefix_caching, "reuse the computation of common beginnings")
_SEED = flags.DEFINE_integer("seed", _DEFAULT.seed, "of the seeds given to requests that bring none")
_ADAPTERS = flags.DEFINE_list("adapters", [], "LoRA adapters to load: NAME=FOLDER,NAME=FOLDER")
_MAX_ADAPTERS = flags.DEFINE_integer("max_adapters", None, "adapters loaded at once; by default those of --adapters")
_RANK = flags.DEFINE_integer("max_adapter_rank", _DEFAULT.max_adapter_rank, "the largest rank of an adapter")
_SPECULATION = flags.DEFINE_integer(
    "speculation", _DEFAULT.speculation, "tokens guessed ahead from a request's own past"
)
_INVARIANT = flags.DEFINE_bool(
    "batch_invariant",
    _DEFAULT.batch_invariant,
    "the same bits for a request alone, in a crowd, and with a cached prefix",
)
TOOLS: Any = flags.DEFINE_enum(
    "tool_parser",
    "auto",
    ["auto", "none", "hermes", "llama3", "mistral"],
    "how the model writes calls of tools; auto goes by its chat template",
)
REASONING: Any = flags.DEFINE_enum(
    "reasoning_parser",
    "auto",
    ["auto", "none", "think"],
    "how the model marks its thinking; auto goes by its chat template and tokens, none leaves it in the content",
)


def model_folder() -> Path:
    return embedded_model() if MODEL.value is None else Path(MODEL.value)


def load_engine(folder: Path, config: EngineConfig) -> Engine:
    """The engine of a model folder, with the adapters that the flags name."""
    engine = Engine.from_folder(folder, config)
    for name, adapter in adapters():
        engine.load_adapter(name, adapter)
    return engine


@contextlib.contextmanager
def recorded(engine: Engine, path: str | None) -> Iterator[None]:
    """Records what the engine is asked, into a trace at `path`; nothing without one. Raises as `TraceRecorder`."""
    if path is None:
        yield
        return
    with TraceRecorder(path, engine.scheduler, step_shapes(engine)) as recorder:
        engine.observers.append(recorder)
        try:
            yield
        finally:
            engine.observers.remove(recorder)


@contextlib.contextmanager
def model_here() -> Iterator[tuple[EngineModel, str]]:
    """The model that the flags name, in an engine of this process, and its name."""
    folder = model_folder()
    with contextlib.closing(load_engine(folder, engine_config())) as engine:
        engine.start()
        yield EngineModel(engine), folder.resolve().name


def adapters() -> list[tuple[str, str]]:
    """Names and folders of those that the flags name. Raises BadUsage."""
    pairs = [text.partition("=") for text in _ADAPTERS.value]
    for name, _, folder in pairs:
        if not name or not folder:
            raise job.BadUsage(f"--adapters: found {','.join(_ADAPTERS.value)!r}, expected NAME=FOLDER,...")
    return [(name, folder) for name, _, folder in pairs]


def _client_weights() -> dict[str, int]:
    weights = {}
    for text in _WEIGHTS.value:
        name, _, weight = text.rpartition("=")
        if not name or not weight.isdecimal() or int(weight) < 1:
            raise job.BadUsage(f"--client_weights: found {text!r}, expected NAME=WEIGHT with an integer >= 1")
        weights[name] = int(weight)
    return weights


def engine_config(**changes: Any) -> EngineConfig:
    """The settings that the flags ask for."""
    settings: dict[str, Any] = {
        "max_sequences": _SEQUENCES.value,
        "max_batch_tokens": _BATCH.value,
        "max_model_len": _WINDOW.value,
        "page_size": _PAGE.value,
        "num_pages": _PAGES.value,
        "prefix_caching": _CACHING.value,
        "dtype": _DTYPE.value,
        "max_waiting": _WAITING.value,
        "policy": _POLICY.value,
        "quantum": _QUANTUM.value,
        "client_weights": _client_weights(),
        "reserve_pages": _RESERVE.value,
        "max_adapters": len(adapters()) if _MAX_ADAPTERS.value is None else _MAX_ADAPTERS.value,
        "max_adapter_rank": _RANK.value,
        "speculation": _SPECULATION.value,
        "batch_invariant": _INVARIANT.value,
        "seed": _SEED.value,
    }
    return EngineConfig(**{**settings, **changes})
