"""What the study runs: every stream with every seed, through each policy with each bound on the error."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.policies import BayesThreshold, VCacheRule, make_policy
from jaxstack.serving.semantic_cache.policy import Policy
from jaxstack.serving.semantic_cache.streams import STREAMS, Stream, make_stream
from launch.vectorq_study.replay import Neighbours, Replay, replay, replay_static

# The grids of both versions of the paper, and a fine one, so that no static threshold between them would do better.
PAPER_THRESHOLDS = (
    0.74, 0.76, 0.78, 0.80, 0.825, 0.83, 0.85, 0.86, 0.875, 0.89, 0.90, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.99,
)  # fmt: skip
THRESHOLDS = np.unique(np.round([*np.arange(0.3, 0.996, 0.005), *PAPER_THRESHOLDS], 3))

OURS, PAPER = "bayes", "vcache"
WITHOUT_BUDGET = "bayes, no budget"
OTHERS = (WITHOUT_BUDGET, "global", "sigmoid-only", "sigmoid-probability", "wilson-iid")
"""Run with one bound, and the first seeds, only."""
_OTHERS_SEEDS = 2
_CURVE_POINTS, _ENTRIES_SHOWN = 80, 6
_SHOWN_STREAM = "combo"


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """How much is run.

    Args:
      requests: of a stream.
      seeds: of each stream.
      deltas: bounds on wrong answers a request.
      headline: the one of them that other policies run with, and that gains are told for.
      streams: names.
      data: files in place of made-up streams.
      embedding, response: NAMEs of their columns, where they have several.
    """

    requests: int = 8000
    seeds: int = 5
    deltas: tuple[float, ...] = (0.01, 0.02, 0.03, 0.05)
    headline: float = 0.02
    streams: tuple[str, ...] = tuple(STREAMS)
    data: tuple[str, ...] = ()
    embedding: str | None = None
    response: str | None = None

    def __post_init__(self) -> None:
        if self.requests < 100:
            raise UserError(f"--vectorq_requests: found {self.requests}, expected at least 100")
        for name in self.streams:
            if name not in STREAMS:
                raise UserError(f"--streams: found {name!r}, expected some of {', '.join(STREAMS)}", exit_code=2)
        if not all(0 < delta <= 0.5 for delta in self.deltas) or not self.deltas:
            raise UserError(f"--deltas: found {self.deltas}, expected numbers in (0, 0.5]", exit_code=2)
        if self.headline not in self.deltas:
            raise UserError(f"--deltas: found {self.deltas}, expected {self.headline} among them", exit_code=2)


@dataclasses.dataclass(frozen=True)
class Task:
    """One stream with one seed, ready to be sent to another process."""

    settings: StudyConfig
    stream: str
    seed: int

    @property
    def policies(self) -> list[tuple[str, float]]:
        """Names and bounds of what runs."""
        config = self.settings
        both = [(name, delta) for name in (OURS, PAPER) for delta in config.deltas]
        return both + [(name, config.headline) for name in OTHERS if self.seed < _OTHERS_SEEDS]


def tasks(config: StudyConfig) -> dict[str, Task]:
    """Name of a part -> what it is."""
    if config.data:
        # Files have one order; seeds are of the coins alone.
        return {f"data-{i}-{seed}": Task(config, path, seed) for i, path in enumerate(config.data)
                for seed in range(config.seeds)}  # fmt: skip
    return {f"{name}-{seed}": Task(config, name, seed) for seed in range(config.seeds) for name in config.streams}


def run_task(task: Task) -> dict[str, Any]:
    """Computes a part."""
    config = task.settings
    stream = _stream(task)
    near = Neighbours(stream.vectors)
    hits, errors = replay_static(stream, near, THRESHOLDS)
    part: dict[str, Any] = {
        "stream": stream.name,
        "seed": task.seed,
        "requests": len(stream),
        "static": {"hits": hits.tolist(), "errors": errors.tolist()},
        "runs": {},
    }
    for name, delta in task.policies:
        policy = _policy(name, delta)
        found = replay(stream, near, policy, task.seed)
        part["runs"].setdefault(name, {})[f"{delta:g}"] = _record(found, policy, curve=name in (OURS, PAPER))
        show = stream.name == _SHOWN_STREAM and task.seed == 0 and delta == config.headline
        if show and isinstance(policy, BayesThreshold | VCacheRule) and name in (OURS, PAPER):
            part.setdefault("entries", {})[name] = _regions(policy, found, delta)
    return part


def _stream(task: Task) -> Stream:
    config = task.settings
    if not config.data:
        return make_stream(task.stream, config.requests, task.seed)
    from jaxstack.serving.semantic_cache.datasets import read_stream

    return read_stream(task.stream, embedding=config.embedding, response=config.response)


def _policy(name: str, delta: float) -> Policy:
    if name == WITHOUT_BUDGET:
        return make_policy(OURS, delta=delta, controller=False)
    return make_policy(name, delta=delta)


def _record(found: Replay, policy: Policy, *, curve: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"hits": found.hits, "error": found.error, "labels": len(found.labels)}
    if isinstance(policy, BayesThreshold):
        estimate = policy.budget.estimate()
        row |= {"estimate": estimate.error, "half_width": estimate.half_width, "delta_eff": policy.budget.delta_eff}
    if curve:
        n = len(found.hit)
        at = np.unique(np.linspace(1, n, _CURVE_POINTS).astype(int))
        row["curve"] = {
            "requests": at.tolist(),
            "hits": (np.cumsum(found.hit)[at - 1] / at).round(5).tolist(),
            "error": (np.cumsum(found.wrong)[at - 1] / at).round(6).tolist(),
        }
    return row


def _regions(policy: BayesThreshold | VCacheRule, found: Replay, delta: float) -> list[dict[str, Any]]:
    """tau by similarity of the entries with the most labels, and these."""
    labels: dict[int, list[tuple[float, bool]]] = {}
    for entry, similarity, right in found.labels:
        labels.setdefault(entry, []).append((similarity, right))
    most = sorted(labels, key=lambda entry: (-len(labels[entry]), entry))[:_ENTRIES_SHOWN]
    s = np.linspace(0, 1, 101)
    rows = []
    for entry in most:
        if isinstance(policy, BayesThreshold):
            alpha = policy.table.alpha(np.full(len(s), entry), s)
            tau = np.maximum(policy.tau_min, 1 - policy.budget.delta_eff / np.maximum(1 - alpha, 1e-12))
        else:
            tau = policy.taus([entry] * len(s), s, np.full(len(s), delta))
        rows.append(
            {"entry": entry, "similarity": s.round(2).tolist(), "tau": np.clip(tau, 0, 1).round(4).tolist(),
             "labels": [(round(at, 3), right) for at, right in labels[entry]]}
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------- static thresholds


def best_static(
    hits: Float[np.ndarray, "thresholds"], errors: Float[np.ndarray, "thresholds"], delta: float
) -> tuple[float, float | None]:
    """Most hits of a threshold whose error is at most delta, chosen in hindsight; and that threshold, if any."""
    allowed = np.flatnonzero(errors <= delta)
    if not len(allowed):
        return 0.0, None
    best = allowed[np.argmax(hits[allowed])]
    return float(hits[best]), float(THRESHOLDS[best])


def hits_at_error(
    hits: Float[np.ndarray, "thresholds"], errors: Float[np.ndarray, "thresholds"], error: float
) -> float:
    """Hits of the static frontier at an error, linear between thresholds, from none at no error."""
    order = np.lexsort((hits, errors))
    at = np.concatenate([[0.0], errors[order]])
    most = np.maximum.accumulate(np.concatenate([[0.0], hits[order]]))
    return float(np.interp(error, at, most))


def error_at_hits(
    hits: Float[np.ndarray, "thresholds"], errors: Float[np.ndarray, "thresholds"], wanted: float
) -> float | None:
    """The least error of the static frontier that gives so many hits; None if no threshold gives as many."""
    if wanted > hits.max():
        return None
    order = np.lexsort((-errors, hits))
    at, least = hits[order], np.minimum.accumulate(errors[order][::-1])[::-1]
    return float(np.interp(wanted, np.concatenate([[0.0], at]), np.concatenate([[0.0], least])))


def statics(parts: Mapping[str, Mapping[str, Any]], stream: str) -> tuple[Any, Any]:
    """Hits and errors by threshold, means over seeds."""
    rows = [part["static"] for part in parts.values() if part["stream"] == stream]
    return np.mean([row["hits"] for row in rows], axis=0), np.mean([row["errors"] for row in rows], axis=0)
