"""PuLP's and CBC's side of `launch.bench_allocation`: the program of Melange's paper, a binary for every slice and
type, called as its authors call it. Runs in the peers' environment and imports nothing of ours.
"""

import resource
import time

import pulp
from answering import answer_requests


class Peer:
    def versions(self) -> dict:
        return {"versions": {"pulp": pulp.__version__}}

    def solve(self, prices: list, loads: list, slices: int, limit_s: float) -> dict:
        """The cheapest counts.

        Args:
          loads: of each bucket on each type, replicas that all of it takes; None where the type cannot serve it.
        """
        began, cpu = time.perf_counter(), _cpu_s()
        parts = [[None if load is None else load / slices for load in row] for row in loads for _ in range(slices)]
        types = range(len(prices))
        problem = pulp.LpProblem("allocation", pulp.LpMinimize)
        goes = [
            [
                pulp.LpVariable(f"x_{s}_{g}", lowBound=0, upBound=0 if part[g] is None else 1, cat=pulp.LpInteger)
                for g in types
            ]
            for s, part in enumerate(parts)
        ]
        counts = [pulp.LpVariable(f"n_{g}", lowBound=0, cat=pulp.LpInteger) for g in types]
        problem += pulp.lpSum(price * count for price, count in zip(prices, counts))
        for row in goes:
            problem += pulp.lpSum(row) == 1
        for g in types:
            problem += pulp.lpSum(row[g] * (part[g] or 0.0) for row, part in zip(goes, parts)) <= counts[g]
        problem.solve(pulp.PULP_CBC_CMD(msg=0, timeLimit=limit_s, timeMode="cpu"))
        found = [count.value() for count in counts]
        return {
            "status": pulp.LpStatus[problem.status],
            "cost": None if None in found else sum(price * round(count) for price, count in zip(prices, found)),
            "counts": None if None in found else [round(count) for count in found],
            "wall_s": time.perf_counter() - began,
            "cpu_s": _cpu_s() - cpu,
            "binaries": len(parts) * len(prices),
        }


def _cpu_s() -> float:
    """Of this process and the solver's, which has ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


if __name__ == "__main__":
    answer_requests(Peer())
