"""From a plan to the tables that a router reads."""

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem
from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.mixed_fleet import RoutingTable


def routing_table(allocation: Allocation, problem: AllocationProblem) -> RoutingTable:
    """Rates, concurrency and shares of the types that are rented, and the output lengths that were planned for.

    Raises:
      UserError: there is no plan, or a profile that does not know how many requests are under way.
    """
    if not allocation.found:
        raise UserError(f"routing: found a plan that is {allocation.status}, expected one that can be run")
    profile = problem.profile
    if profile.concurrency is None:
        raise UserError("routing: found a profile without concurrency, expected the requests under way at each rate")
    rented = [name for name, count in allocation.counts.items() if count]
    shares = {name: allocation.shares[..., g].tolist() for g, name in enumerate(problem.names)}
    return RoutingTable(
        problem.workload.grid.input_edges_tokens,
        problem.workload.grid.output_edges_tokens,
        {name: profile.max_rate_rps[name].tolist() for name in rented},
        {name: profile.concurrency[name].tolist() for name in rented},
        {name: shares[name] for name in rented},
        problem.workload.distribution.tolist(),
    )
