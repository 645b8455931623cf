"""ONE replica: requests in, tokens out.

`engine.py` takes requests and hands out tokens; `scheduler.py` decides what a step computes, with a policy from
`scheduling/` and pages and cached prefixes from `memory/` (all three plain Python, no jax); `batch.py` packs the
decision into arrays of a fixed shape; `runner.py` owns the device arrays and runs the compiled step, which calls the
model and `sampling.py`; `detokenise.py` makes text.
"""

from jaxstack.engine.config import EngineConfig
from jaxstack.engine.engine import Engine, EngineDead, EngineStats, PromptTooLong, QueueFull
from jaxstack.engine.request import (
    Completion,
    Delta,
    Guide,
    RequestOutput,
    RequestTiming,
    SamplingParams,
    TokenLogprob,
)

__all__ = [
    "Completion",
    "Delta",
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
