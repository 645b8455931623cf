"""A live engine as a `Server` of `scheduling/driving.py`: what drives the simulator drives it, too."""

import time
from collections.abc import Hashable
from collections.abc import Sequence as Seq

from jaxstack.engine.engine import Engine
from jaxstack.engine.observer import Silent
from jaxstack.engine.request import Request, SamplingParams, Sequence
from jaxstack.engine.scheduling.driving import Arrival, Outcome, TokenIds
from jaxstack.engine.scheduling.step_cost import StepShapes


def step_shapes(engine: Engine) -> StepShapes:
    """The sizes that an engine's steps are padded to, for a cost model of it."""
    shapes = engine.runner.shapes
    decode = sorted(shape.rows for shape in shapes if shape.decode)
    return StepShapes(tuple(decode), tuple(sorted(shape.rows for shape in shapes if not shape.decode)))


def arrival_sampling(arrival: Arrival) -> SamplingParams:
    """How an arrival is answered: to its full length, whatever the model says."""
    return SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True)


class EngineServer(Silent):
    """Takes the steps of an engine that has no thread of its own. Answers run to their length, past end tokens.

    Args:
      engine: warm, and nothing open; it is observed from now on, until `close`.
      number: of this replica.

    Attributes:
      began_s: what `time.perf_counter` shows at the zero of `now_s`.
    """

    def __init__(self, engine: Engine, number: int = 0):
        self.engine, self.number = engine, number
        self.began_s = time.perf_counter()
        self._arrivals: dict[str, Arrival] = {}
        self._over: list[Outcome] = []
        self._submitted = 0
        engine.observers.append(self)

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.began_s

    @property
    def unfinished(self) -> int:
        return len(self._arrivals)

    def submit(self, arrival: Arrival) -> None:
        name = f"arrival-{self.number}-{self._submitted}"
        self._submitted += 1
        self._arrivals[name] = arrival
        namespace: Hashable = arrival.namespace
        self.engine.submit(
            list(arrival.prompt),
            arrival_sampling(arrival),
            None,
            name,
            client=arrival.client,
            namespace=None if namespace is None else str(namespace),
            priority=arrival.priority,
        )

    def turn(self) -> list[Outcome] | None:
        worked = self.engine.step()
        over, self._over = self._over, []
        return over if worked or over else None

    def wait_until(self, when_s: float) -> None:
        time.sleep(max(0.0, when_s - self.now_s))

    def close(self) -> None:
        """Ends what is open, and leaves the engine idle and unobserved."""
        for name in list(self._arrivals):
            self.engine.abort(name)
        while self.engine.step():
            pass
        self.engine.observers.remove(self)

    def on_leave(self, request: Request, sequences: Seq[Sequence], place: int) -> None:
        arrival = self._arrivals.pop(request.request_id, None)
        if arrival is None:
            return
        (sequence,) = sequences
        since = lambda when: None if when is None else when - self.began_s  # noqa: E731
        answer: TokenIds = tuple(sequence.tokens[len(request.prompt) :])
        self._over.append(
            Outcome(
                arrival,
                request.arrival_s - self.began_s,
                since(request.scheduled_s),
                since(request.first_token_s),
                self.now_s,
                request.cached_tokens or 0,
                answer,
                sequence.finish_reason or "stop",
                self.number,
            )
        )
