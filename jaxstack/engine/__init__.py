"""ONE replica: requests in, tokens out.

`engine.py` takes requests in and owns the threads; `pipeline.py` runs one step after the other, each started before the
last one's results are read. In a step, `scheduler.py` decides what to compute, with a policy from `scheduling/` and
pages and cached prefixes from `memory/` (all three plain Python, no jax); `batch.py` and `draws.py` pack the decision
into arrays of a fixed shape; `runner.py` owns the device arrays and runs the compiled programs, which call the model
and `sampling.py`; `answers.py` turns tokens into answers, with `detokenise.py` making the text.

What is drawn: `sampling.py` picks a token of each row; `logit_rules.py` is what a request may ask of the logits before
(bias, masks, penalties); `guided.py` follows grammars; `draws.py` packs all that for a step and `sampler.py` holds the
compiled programs and their state.
"""

from jaxstack.engine.config import EngineConfig
from jaxstack.engine.engine import Engine, EngineDead, PromptTooLong, QueueFull
from jaxstack.engine.prompt_embeddings import EmbeddingPrompt
from jaxstack.engine.request import (
    Completion,
    Delta,
    Guide,
    RequestOutput,
    RequestTiming,
    SamplingParams,
    TokenLogprob,
)
from jaxstack.engine.stats import EngineStats

__all__ = [
    "Completion",
    "Delta",
    "EmbeddingPrompt",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineStats",
    "Guide",
    "PromptTooLong",
    "QueueFull",
    "RequestOutput",
    "RequestTiming",
    "SamplingParams",
    "TokenLogprob",
]
