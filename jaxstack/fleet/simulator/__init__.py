"""Arrivals on a mix of replicas under a virtual clock, step by step: does a plan keep its objective?

`step_times.py` says what a step takes, from a roofline or fitted to a profile; `replica.py` takes steps; `arrivals.py`
makes requests; `replaying.py` routes them with the router's own policies and counts; `checking.py` solves, replays, and
plans for more until the objective is kept.

The engine's simulator (`engine/scheduling/simulator.py`) plans pages and prefixes of actual tokens, to compare
schedulers of one replica. Here prompts have nothing in common and only lengths matter, so that a step is a few
additions and an hour of a fleet takes seconds.
"""

from jaxstack.fleet.simulator.arrivals import Request, requests_of
from jaxstack.fleet.simulator.checking import CheckedPlan, solve_and_check
from jaxstack.fleet.simulator.replaying import ReplayReport, replay
from jaxstack.fleet.simulator.replica import StepReplica
from jaxstack.fleet.simulator.step_times import StepTimes

__all__ = [
    "CheckedPlan",
    "ReplayReport",
    "Request",
    "StepReplica",
    "StepTimes",
    "replay",
    "requests_of",
    "solve_and_check",
]
