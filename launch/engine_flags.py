"""The flags of every launcher that loads an engine."""

from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine import EngineConfig
from jaxstack.models.embedded import embedded_model

_DEFAULT = EngineConfig()

MODEL = flags.DEFINE_string("model", None, "model folder; by default the embedded Countdown model")
_WINDOW = flags.DEFINE_integer("max_model_len", None, "prompt and answer together, tokens; by default the model's own")
_PAGE = flags.DEFINE_integer("page_size", _DEFAULT.page_size, "tokens in a page of the KV cache, a power of two")
_PAGES = flags.DEFINE_integer("pages", None, "pages of the KV cache; by default chosen from the free memory")
_SEQUENCES = flags.DEFINE_integer("max_sequences", _DEFAULT.max_sequences, "answers generated at once")
_BATCH = flags.DEFINE_integer("max_batch_tokens", _DEFAULT.max_batch_tokens, "tokens computed in one step")
_WAITING = flags.DEFINE_integer("max_waiting", _DEFAULT.max_waiting, "requests that may wait for their first step")
_DTYPE: Any = flags.DEFINE_enum("dtype", _DEFAULT.dtype, ["auto", "float32", "bfloat16"], "of weights and cache")
_CACHING = flags.DEFINE_bool("prefix_caching", _DEFAULT.prefix_caching, "reuse the computation of common beginnings")
_SEED = flags.DEFINE_integer("seed", _DEFAULT.seed, "of the seeds given to requests that bring none")
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
        "seed": _SEED.value,
    }
    return EngineConfig(**{**settings, **changes})
