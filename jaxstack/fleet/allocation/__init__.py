"""The cheapest mix of accelerator types for a workload (Melange, Griggs et al. 2024, arXiv 2404.14527).

Lengths of requests make a `Workload`; with types, their prices and a `ThroughputProfile` it is an `AllocationProblem`
(`problem.py`); `solve` makes a mixed-integer program of it (`program.py`) and returns an `Allocation`: counts, the
share of each bucket that each type takes, the cost, a proven bound, and reasons by name where nothing can do
(`reasons.py`). `check.py` recomputes what a plan claims in exact arithmetic. `baselines.py` has what others do,
`sensitivity.py` what would change the answer, `routing.py` the arrays for a router, `replanning.py` when to change a
plan that is running.
"""

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem, Infeasibility
from jaxstack.fleet.allocation.solving import solve
from jaxstack.fleet.allocation.workload import Workload

__all__ = ["Allocation", "AllocationProblem", "Infeasibility", "Workload", "solve"]
