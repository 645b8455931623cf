"""Step after step, each started before the results of the one before are read.

One turn, and what the device does meanwhile (i is the step in flight, i + 1 the new one):

    host:    plan i+1, pack | launch forward i+1 | read i: take tokens, stop rules | pack and launch sampler i+1
    device:  forward i, sampler i ............... | forward i+1 .................................. | sampler i+1

The input token of a decode row never passes through the host: sampler i leaves it on the device. What the host learns
from reading step i (who has finished, what a grammar allows next) comes too late for forward i+1, in time for sampler
i+1: so a sequence that ends runs one row too many, whose token is dropped, and nothing else waits for anybody. A
sequence that reaches `max_tokens` is known to end beforehand and has no such row. Only steps that guess
(`speculate.py`) run one after the other: a guess follows tokens that are known.
"""

import collections
import time

import numpy as np

from jaxstack.engine.answers import Answers
from jaxstack.engine.batch import pack
from jaxstack.engine.draws import DrawPacker
from jaxstack.engine.observer import Observer
from jaxstack.engine.prompt_scores import PageScores, pack_targets
from jaxstack.engine.request import Sequence
from jaxstack.engine.runner import Runner, StepFuture
from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.step_plan import StepPlan


class Pipeline:
    """Runs the scheduler's plans on the runner and gives the drawn tokens to the answers. Used by one thread at a time.

    Args:
      overlap: False settles each step in the turn that launched it.

    Attributes:
      scheduler: may be replaced while nothing is in flight, or before `discard`.
      observers: told of each step.
      iteration_tokens: how many steps computed so many tokens.
      step_seconds: spent in turns that computed something; of these, `wait_seconds` waiting for the device, the rest
        planning, packing, launching and taking tokens.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, answers: Answers, *, page_size: int, overlap: bool):
        self.scheduler, self.runner, self._answers = scheduler, runner, answers
        self._page_size, self._overlap = page_size, overlap
        sampler = runner.sampler
        self._packer = DrawPacker(scrap_slot=sampler.scrap_slot, layout=sampler.layout, eos=answers.eos)
        self._in_flight: StepFuture | None = None
        self._launched_s = 0.0
        self.observers: list[Observer] = []
        self.iteration_tokens: collections.Counter[int] = collections.Counter()
        self.launches = self.steps = self.rows = self.padding = 0
        self.step_seconds = self.wait_seconds = 0.0

    @property
    def place(self) -> int:
        """Steps launched plus steps settled (or lost): the pipeline's own time."""
        return self.launches + self.steps

    def turn(self) -> bool:
        """Starts the next step and settles the one in flight. False when there was nothing of either."""
        begin = time.perf_counter()
        busy = self._in_flight is not None
        if self._in_flight is not None and (self._in_flight.batch.plan.drafted or self.scheduler.drafting):
            self.settle()
        plan = self.scheduler.plan()
        if plan is None:  # the step in flight may free the pages that are missing
            self.settle()
            plan = self.scheduler.plan()
            assert plan is not None
        if plan.rows:
            batch = pack(plan, self.runner.shapes, page_size=self._page_size, num_pages=self.scheduler.pool.size)
            launched_s = time.perf_counter()
            launched = self.runner.launch(batch)
            if (targets := pack_targets(plan, batch.shape.rows)) is not None:
                launched = self.runner.score(launched, targets)
            self.scheduler.launched(plan)
            self.launches += 1
            self.settle()
            self._in_flight = self.runner.draw(launched, self._packer.pack(plan, batch.shape.samples))
            self._launched_s = launched_s
            if not self._overlap or all(row.sequence.finish_reason is not None for row in plan.rows):
                self.settle()
        else:
            self.settle()
        if busy or plan.rows:
            self.step_seconds += time.perf_counter() - begin
        return busy or bool(plan.rows)

    def settle(self) -> None:
        """Waits for the step in flight, if there is one, and takes its tokens."""
        future, self._in_flight = self._in_flight, None
        if future is None:
            return
        begin = time.perf_counter()
        tokens = future.tokens()
        now = time.perf_counter()
        self.wait_seconds += now - begin
        plan, shape = future.batch.plan, future.batch.shape
        self.steps += 1
        self.rows += plan.tokens
        self.padding += shape.rows - plan.tokens
        self.iteration_tokens[plan.tokens] += 1
        self.scheduler.settled(plan)
        for observer in self.observers:
            observer.on_step(plan, shape.rows, self._launched_s, now)
        if future.scores is not None:
            self._take_scores(plan, PageScores(*map(np.asarray, future.scores)))
        self._take_hidden(plan, future)
        accepted: dict[Sequence, list[bool]] = {}
        for i, row in enumerate(plan.rows):
            if row.samples and row.sequence.finish_reason is None:
                if row.sequence.request.pooled is not None:
                    self._answers.end_request(row.sequence.request.request_id, "stop")
                    continue
                if row.draft is not None:
                    accepted.setdefault(row.sequence, []).append(self.scheduler.accept(row))
                    if not accepted[row.sequence][-1]:
                        continue
                wanted = row.sequence.request.logprobs
                logprobs = () if wanted is None or tokens[i] < 0 else (future.logprobs(i, wanted),)
                self._answers.take(row.sequence, tokens[i], logprobs, now)
        for sequence, each in accepted.items():
            sequence.drafter.learn(len(each), sum(each))

    def _take_hidden(self, plan: StepPlan, future: StepFuture) -> None:
        hidden, at = None, 0
        for row in plan.rows:
            pooled = row.sequence.request.pooled
            if pooled is not None and row.sequence.finish_reason is None:
                if hidden is None:
                    hidden = np.asarray(future.hidden).astype(np.float32)
                pooled.add(row.start, hidden[at : at + row.count], last=row.samples)
            at += row.count

    def _take_scores(self, plan: StepPlan, scores: PageScores) -> None:
        at = 0
        for row in plan.rows:
            found = row.sequence.request.scores
            if row.scores and row.sequence.finish_reason is None:
                found.add(row.start + 1, PageScores(*(array[at : at + row.count] for array in scores)))
                if found.complete:
                    self.scheduler.keep_scores(row.sequence)
            at += row.count

    def discard(self, scheduler: Scheduler) -> None:
        """Forgets the step in flight after a failure and goes on with `scheduler`."""
        self._in_flight = None
        self._packer.forget()
        self.scheduler = scheduler
