"""One replica: a queue, continuous batching, prompts in chunks or whole; no pages, no prefixes, no preemption."""

import collections
import math

from jaxstack.fleet.simulator.arrivals import Request
from jaxstack.fleet.simulator.step_times import StepTimes
from jaxstack.runtime.errors import UserError


class StepReplica:
    """Takes steps as long as it has work.

    A request is taken in, first come first served, when there is room for all of its tokens. Its prompt is computed in
    chunks beside the decoding of others, or as a whole; the step that ends it brings the first token, and every step
    after that one more. With `chunk_tokens` None all prompts that were taken in are computed in one step.

    Args:
      kind: of accelerator.
      chunk_tokens: of prompts in a step; None: all.

    Attributes:
      active: requests that are not over.
      busy_s: in steps.
    """

    def __init__(self, name: str, kind: str, times: StepTimes, *, chunk_tokens: int | None = 512):
        if chunk_tokens is not None and chunk_tokens < 1:
            raise UserError(f"chunk_tokens: found {chunk_tokens}, expected an integer >= 1 or None")
        self.name, self.kind, self.times = name, kind, times
        self.active = 0
        self.busy_s = 0.0
        self._chunk = math.inf if chunk_tokens is None else chunk_tokens
        self._waiting: collections.deque[Request] = collections.deque()
        self._prompts: collections.deque[tuple[Request, list[float]]] = collections.deque()  # and tokens left
        self._done_after: list[Request] = []  # prompts that end with the step under way
        self._ends_at: dict[int, list[Request]] = {}
        self._steps = self._batch = self._context = self._reserved = self._taken = 0
        self._due_s = math.inf
        self._finished: list[Request] = []

    def holds(self, request: Request) -> bool:
        """Whether it can ever serve the request."""
        return request.input_tokens + request.output_tokens <= self.times.kv_tokens

    def submit(self, request: Request, now_s: float) -> None:
        """Queues a request that it `holds`. Everything until `now_s` must have been advanced to."""
        request.replica = self.name
        self.active += 1
        self._waiting.append(request)
        if self._due_s == math.inf:
            self._begin(now_s)

    def advance(self, until_s: float) -> list[Request]:
        """Takes the steps that end by then; returns the requests that ended."""
        while self._due_s <= until_s and self._due_s < math.inf:
            self._settle()
        finished, self._finished = self._finished, []
        return finished

    # Inside.

    def _begin(self, now_s: float) -> None:
        """The next step, if there is work."""
        times, waiting = self.times, self._waiting
        while waiting and self._taken < times.max_batch:
            need = waiting[0].input_tokens + waiting[0].output_tokens
            if self._reserved + need > times.kv_tokens:
                break
            request = waiting.popleft()
            self._reserved += need
            self._taken += 1
            self._prompts.append((request, [request.input_tokens]))
        room = self._chunk
        prompt_tokens = 0.0
        while self._prompts and room > 0:
            request, left = self._prompts[0]
            part = min(room, left[0])
            left[0] -= part
            room -= part
            prompt_tokens += part
            if left[0] > 0:
                break
            self._prompts.popleft()
            self._done_after.append(request)
        if not self._batch and not prompt_tokens:
            self._due_s = math.inf
            return
        seconds = times.seconds(self._batch, self._context, int(prompt_tokens))
        self.busy_s += seconds
        self._due_s = now_s + seconds

    def _settle(self) -> None:
        now = self._due_s
        self._steps += 1
        self._context += self._batch
        for request in self._ends_at.pop(self._steps, ()):
            self._batch -= 1
            self._context -= request.input_tokens + request.output_tokens
            self._end(request, now)
        for request in self._done_after:
            request.first_s = now
            if request.output_tokens == 1:
                self._end(request, now)
                continue
            self._batch += 1
            self._context += request.input_tokens + 1
            self._ends_at.setdefault(self._steps + request.output_tokens - 1, []).append(request)
        self._done_after.clear()
        self._begin(now)

    def _end(self, request: Request, now_s: float) -> None:
        request.end_s = now_s
        self._reserved -= request.input_tokens + request.output_tokens
        self._taken -= 1
        self.active -= 1
        self._finished.append(request)
