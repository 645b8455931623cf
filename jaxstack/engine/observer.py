"""Who watches a replica work: told of each request that enters and leaves, and of each step once it has settled.

The engine (`Engine.observers`) and the simulator (`scheduling/simulator.py`) tell the same. Plain Python, no jax.
"""

from collections.abc import Sequence as Seq
from typing import Protocol

from jaxstack.engine.request import Request, Sequence
from jaxstack.engine.step_plan import StepPlan


class Observer(Protocol):
    """Called on the thread that steps. What it raises ends the step, so it had better not."""

    def on_enter(self, request: Request, place: int) -> None:
        """`request` is about to wait.

        Args:
          place: steps launched so far plus steps settled so far. It says between which two decisions the request came
            in, whatever the clock.
        """
        ...

    def on_step(self, plan: StepPlan, rows: int, launched_s: float, settled_s: float) -> None:
        """A step has settled; its tokens have not been taken yet. `rows` of it were computed, padding among them."""
        ...

    def on_leave(self, request: Request, sequences: Seq[Sequence], place: int) -> None:
        """The last of the request's choices, `sequences`, has ended."""
        ...


class Silent:
    """An observer that does nothing, for others to begin from."""

    def on_enter(self, request: Request, place: int) -> None:
        pass

    def on_step(self, plan: StepPlan, rows: int, launched_s: float, settled_s: float) -> None:
        pass

    def on_leave(self, request: Request, sequences: Seq[Sequence], place: int) -> None:
        pass
