"""ONE replica: requests in, tokens out.

`engine.py` is the way in, and puts the rest together. A request is checked by `prompts.py` (`prompt_embeddings.py`
where it comes as vectors), refused with one of `errors.py`, and posted to `driver.py`, which owns the lock, the inbox
and the thread, and takes the turns; `asking.py` waits for many requests at once.

In a turn, `pipeline.py` runs one step after the other, each started before the last one's results are read.
`scheduler.py` decides what to compute (a `step_plan.py`), with a policy from `scheduling/`, pages and cached prefixes
from `memory/` (named by `prefixes.py`) and guesses from `speculate.py` (all plain Python, no jax); `batch.py` and
`draws.py` pack the decision into arrays of a fixed shape; `runner.py` owns the device arrays, laid out by
`placement.py`, and runs the compiled programs; `answers.py` turns tokens into answers, with `detokenise.py` making
the text, for the listeners of `listeners.py`.

What is drawn: `sampling.py` picks a token of each row; `logit_rules.py` is what a request may ask of the logits before
(bias, masks, penalties); `guided.py` follows grammars; `draws.py` packs all that for a step and `sampler.py` holds the
compiled programs and their state. What is read off a prompt instead: `scoring.py` and `prompt_scores.py` make the
logprobs of its tokens, `pooling.py` its vector.

A model larger than its device: `offload.py` says what stays there and what is streamed; `pipelined_runner.py` stands in
for `runner.py`, cuts a step into micro-batches and has `executor.py` run a schedule of `memory/`, whose tasks
`pipelined_step.py` does with the pieces of `layerwise.py` and the weights of `page_store.py`; `emulated_decode.py`
races schedules on an emulated machine.

`config.py` has the settings and the sizes that follow from them; `weights.py` makes a decoder ready to be served,
`adapters.py` keeps account of its LoRA adapters, `invariance.py` proves that bits do not depend on the batch, and
`stats.py` takes readings. `request.py` has the types that all of them pass around. Whoever is one of `observer.py` is
told of each request and step; `live.py` puts an engine under the same load as the simulator in `scheduling/`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxstack.engine.errors import EngineDead, PromptTooLong, QueueFull
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
from jaxstack.engine.scheduling import FairnessReading

if TYPE_CHECKING:
    from jaxstack.engine.config import EngineConfig
    from jaxstack.engine.engine import Engine
    from jaxstack.engine.stats import EngineStats

# What needs jax comes when it is asked for: policies, the simulator and a router run without.
_WITH_JAX = {
    "Engine": "jaxstack.engine.engine",
    "EngineConfig": "jaxstack.engine.config",
    "EngineStats": "jaxstack.engine.stats",
}

__all__ = [
    "Completion",
    "Delta",
    "EmbeddingPrompt",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "EngineStats",
    "FairnessReading",
    "Guide",
    "PromptTooLong",
    "QueueFull",
    "RequestOutput",
    "RequestTiming",
    "SamplingParams",
    "TokenLogprob",
]


def __getattr__(name: str) -> Any:
    if name not in _WITH_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(_WITH_JAX[name]), name)
    return found
