"""A reading of the engine."""

import dataclasses


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
      recompilations: programs compiled since the warm-up; zero is the promise.
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
