"""A trace of what clients asked a live engine, and its replay: what would have happened under another policy?

A trace holds no text and no token: each page of a prompt and its answer is a number, equal where the pages' tokens
were, which is all that a prefix cache looks at. It also holds what steps took, so that a step's cost can be fitted to
it. One JSON object a line, the first of which describes the recording. Plain Python, no jax.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, TextIO

from jaxstack.engine.observer import Silent
from jaxstack.engine.request import Request, Sequence
from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.scheduling.driving import Arrival, OpenLoop, TokenIds
from jaxstack.engine.scheduling.step_cost import UNPADDED, FitError, StepCostModel, StepLog, StepSample, StepShapes
from jaxstack.engine.step_plan import StepPlan
from jaxstack.runtime.errors import UserError

_FORMAT = "jaxstack request trace 1"
# So many steps are all written down, and one in so many after that.
_ALL_STEPS, _SOME_STEPS = 4000, 16


@dataclasses.dataclass(frozen=True)
class TracedRequest:
    """One choice of a request as it was recorded.

    `pages` number the pages of prompt and answer together, the last one as far as it went. `enters_at` and `ended_at`
    count steps launched plus steps settled; `arrival_s` counts from the start of the recording.
    """

    client: str
    arrival_s: float
    enters_at: int
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    pages: tuple[int, ...]
    finish_reason: str
    open_s: float
    namespace: int = 0
    priority: int = 0

    def arrival(self, page_size: int, *, by_place: bool) -> Arrival:
        """The request as one to come."""
        tokens = self._tokens(page_size)
        given_up = self.finish_reason in ("abort", "timeout")
        return Arrival(
            self.client,
            tokens[: self.prompt_tokens],
            # One that was given up would have gone on.
            self.max_tokens if given_up else max(1, self.output_tokens),
            at_s=0.0 if by_place else self.arrival_s,
            max_tokens=self.max_tokens,
            answer=None if given_up else tokens[self.prompt_tokens :] or (-1,),
            enters_at=self.enters_at if by_place else None,
            leaves_after_s=self.open_s if given_up and not by_place else None,
            namespace=self.namespace,
            priority=self.priority,
        )

    def _tokens(self, page_size: int) -> TokenIds:
        """A token for each position; those of a page are its number."""
        return tuple(self.pages[p // page_size] for p in range(self.prompt_tokens + self.output_tokens))


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was recorded, in the order in which it came in, from an engine with these settings."""

    page_size: int
    num_pages: int
    max_sequences: int
    max_batch_tokens: int
    requests: tuple[TracedRequest, ...]
    steps: tuple[StepSample, ...] = ()
    shapes: StepShapes = UNPADDED

    @property
    def seconds(self) -> float:
        return max((r.arrival_s + r.open_s for r in self.requests), default=0.0)

    def costs(self) -> tuple[StepCostModel, FitError]:
        """A step's cost on the engine that was recorded, fitted to half of its steps, and its error on the others.

        Raises:
          UserError: too few steps.
        """
        model = StepCostModel.fit(self.steps[::2], self.shapes)
        return model, model.error(self.steps[1::2])

    def workload(self, *, by_place: bool = False) -> OpenLoop:
        """The recorded requests, at their recorded times; `by_place`, between the same two steps as then instead,
        which repeats the engine's decisions whatever the clock.
        """
        return OpenLoop([request.arrival(self.page_size, by_place=by_place) for request in self.requests])


class TraceRecorder(Silent):
    """An observer of a live engine that writes a trace.

    Args:
      path: the file; replaced if it is there.
      scheduler: the engine's, for its settings.
      shapes: what its steps are padded to.
    """

    def __init__(self, path: str | Path, scheduler: Scheduler, shapes: StepShapes = UNPADDED):
        self._page_size = scheduler.page_size
        self._began_s = time.perf_counter()
        self._began_at: int | None = None
        self._entered: dict[int, int] = {}
        self._secret = os.urandom(16)
        self.requests = 0
        self._steps, self._log = 0, StepLog()
        try:
            self._file: TextIO = open(path, "w")  # noqa: SIM115 - lives as long as the recorder
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}), expected a file for the trace") from error
        self._write(
            {
                "format": _FORMAT,
                "page_size": scheduler.page_size,
                "num_pages": scheduler.pool.size,
                "max_sequences": scheduler.max_sequences,
                "max_batch_tokens": scheduler.max_batch_tokens,
                "shapes": dataclasses.asdict(shapes),
            }
        )

    def on_enter(self, request: Request, place: int) -> None:
        if self._began_at is None:
            self._began_at = place
        self._entered[request.order] = place - self._began_at

    def on_step(self, plan: StepPlan, rows: int, launched_s: float, settled_s: float) -> None:
        self._log.on_step(plan, rows, launched_s, settled_s)
        self._steps += 1
        if self._steps <= _ALL_STEPS or self._steps % _SOME_STEPS == 0:
            for sample in self._log.samples:
                self._write({"step": dataclasses.astuple(sample)})
        self._log.samples.clear()

    def on_leave(self, request: Request, sequences: Seq[Sequence], place: int) -> None:
        enters_at = self._entered.pop(request.order, None)
        if enters_at is None:  # it came before the recording began
            return
        now_s = time.perf_counter()
        for sequence in sequences:
            self._write(
                {
                    "order": [request.order, sequence.index],
                    "client": request.client,
                    "arrival_s": round(request.arrival_s - self._began_s, 6),
                    "enters_at": enters_at,
                    "prompt_tokens": len(request.prompt),
                    "output_tokens": sequence.generated,
                    "max_tokens": request.max_tokens,
                    "pages": self._pages(sequence),
                    "finish_reason": sequence.finish_reason or "stop",
                    "open_s": round(now_s - request.arrival_s, 6),
                    "namespace": self._number(repr(request.namespace)) if request.namespace is not None else 0,
                    "priority": request.priority,
                }
            )
        self.requests += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "TraceRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pages(self, sequence: Sequence) -> list[int]:
        size, given, tokens = self._page_size, sequence.request.given, sequence.tokens
        starts = range(0, len(tokens), size)
        keys = (
            tuple(tokens[at : at + size]) if given is None else given.page_key(tokens[at : at + size], at)
            for at in starts
        )
        return [self._number(repr(key)) for key in keys]

    def _number(self, text: str) -> int:
        """The same for the same text within a recording, and telling nobody what the text was."""
        digest = hashlib.blake2b(text.encode(), key=self._secret, digest_size=4).digest()
        return int.from_bytes(digest, "big") >> 1  # 31 bits: pages are compared only where all before them are the same

    def _write(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


def read_trace(path: str | Path) -> Trace:
    """Reads what a `TraceRecorder` wrote; a last line that was cut off is left out.

    Raises:
      UserError: no such file, or not a trace, by line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}), expected a trace") from error
    head = _parsed(lines[0]) if lines else None
    if head is None or head.get("format") != _FORMAT:
        raise UserError(f"{path}, line 1: found {(lines or ['nothing'])[0][:80]!r}, expected the head of a trace")
    names = {field.name for field in dataclasses.fields(TracedRequest)}
    rows: list[tuple[tuple[int, ...], TracedRequest]] = []
    steps: list[StepSample] = []
    for number, line in enumerate(lines[1:], 2):
        row = _parsed(line)
        if row is None and number == len(lines):
            break
        try:
            assert row is not None
            if "step" in row:
                steps.append(StepSample(*row["step"]))
                continue
            fields = {name: row[name] for name in names} | {"pages": tuple(row["pages"])}
            request = TracedRequest(**fields)
            expected = -(-(request.prompt_tokens + request.output_tokens) // head["page_size"])
            if len(request.pages) != expected:
                raise ValueError(f"{len(request.pages)} pages, expected {expected}")
            rows.append((tuple(row["order"]), request))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: found {line[:80]!r}, expected a request ({error!r})") from error
    # By the place, and at one place by order: so they were let in.
    rows.sort(key=lambda row: (row[1].enters_at, row[0]))
    settings = {name: head[name] for name in ("page_size", "num_pages", "max_sequences", "max_batch_tokens")}
    shapes = StepShapes(**{kind: tuple(sizes) for kind, sizes in head.get("shapes", {}).items()})
    return Trace(**settings, requests=tuple(request for _, request in rows), steps=tuple(steps), shapes=shapes)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
