"""A reading of the engine."""

import dataclasses

from jaxstack.engine.answers import Answers
from jaxstack.engine.memory.swap.reading import SwapReading
from jaxstack.engine.pipeline import Pipeline
from jaxstack.engine.runner import Runner


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Counts of tokens, requests and steps are totals since the start.

    Attributes:
      running: sequences that hold pages, those included whose last row is still computing.
      finished: requests by finish reason.
      corrupted_requests: answers lost to logits that were not finite.
      step_seconds: wall time of all turns that computed something. With overlap a turn starts one step and settles the
        one before, so this is still time per step.
      host_seconds: the part of it in which the host worked (plan, pack, launch, take) instead of waiting for the
        device: divided by `steps`, the engine's overhead a step, most of it hidden behind the device's work.
      drafted_tokens, accepted_drafts: guesses computed, and those that were right: each is a step saved.
      step_rows, step_padding: token rows computed for somebody, and for nobody.
      iteration_tokens: how many steps computed exactly so many tokens.
      recompilations: programs compiled by turns, after the warm-up; zero is the promise.
      swap: of keys and values on the host; None without.
    """

    running: int
    waiting: int
    pages_free: int
    pages_tree: int
    pages_private: int
    pages_total: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    drafted_tokens: int
    accepted_drafts: int
    prompt_tokens: int
    generation_tokens: int
    finished: dict[str, int]
    corrupted_requests: int
    steps: int
    step_seconds: float
    host_seconds: float
    step_rows: int
    step_padding: int
    iteration_tokens: dict[int, int]
    recompilations: int
    warm: bool
    warm_progress: float
    alive: bool
    swap: SwapReading | None = None


def reading(pipeline: Pipeline, answers: Answers, runner: Runner, *, posted: int, alive: bool) -> EngineStats:
    """Takes a reading, from any thread.

    Args:
      posted: requests that nobody has let in yet.
      alive: whether requests are answered still.
    """
    scheduler = pipeline.scheduler
    pool, counters = scheduler.pool, scheduler.counters
    return EngineStats(
        running=len(scheduler.running) + len(scheduler.closing),
        waiting=len(scheduler.waiting) + posted,
        pages_free=pool.free,
        pages_tree=pool.tree,
        pages_private=pool.private,
        pages_total=pool.size,
        prefix_queries=counters.prefix_queries,
        prefix_hits=counters.prefix_hits,
        preemptions=counters.preemptions,
        drafted_tokens=counters.drafted_tokens,
        accepted_drafts=counters.accepted_drafts,
        prompt_tokens=answers.prompt_tokens,
        generation_tokens=answers.generation_tokens,
        finished=dict(answers.finished),
        corrupted_requests=answers.corrupted,
        steps=pipeline.steps,
        step_seconds=pipeline.step_seconds,
        host_seconds=pipeline.step_seconds - pipeline.wait_seconds,
        step_rows=pipeline.rows,
        step_padding=pipeline.padding,
        iteration_tokens=dict(pipeline.iteration_tokens),
        recompilations=runner.recompilations,
        warm=runner.warm,
        warm_progress=runner.warm_fraction,
        alive=alive,
        swap=runner.swap_reading(),
    )
