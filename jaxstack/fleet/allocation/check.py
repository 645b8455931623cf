"""Whether a plan does what it says: its loads once more, bucket by bucket, in exact arithmetic, with nothing of the
solver's own arrays.
"""

from fractions import Fraction

from jaxstack.fleet.allocation.problem import Allocation, AllocationProblem

# The shares are floats: a plan that fills a replica to the brim is over it by a rounding, now and then.
_ROUNDING = Fraction(1, 10**9)


def exact_loads(problem: AllocationProblem, allocation: Allocation) -> dict[str, Fraction]:
    """Replicas' worth of work that each type is given, headroom included."""
    rates, headroom = problem.workload.distribution, 1 + Fraction(problem.headroom)
    rate = Fraction(problem.workload.rate_rps) * headroom
    loads = {name: Fraction(0) for name in problem.names}
    for g, name in enumerate(problem.names):
        table = problem.profile.max_rate_rps[name]
        for i in range(rates.shape[0]):
            for j in range(rates.shape[1]):
                share = Fraction(float(allocation.shares[i, j, g]))
                if share and rates[i, j] > 0 and table[i, j] > 0:
                    loads[name] += rate * Fraction(float(rates[i, j])) * share / Fraction(float(table[i, j]))
    return loads


def violations(problem: AllocationProblem, allocation: Allocation) -> list[str]:
    """What is wrong with a plan, in sentences: buckets that are not served as a whole, or by a type that cannot; types
    with more work than replicas, more replicas than can be had, or another cost than the sum of its rents.
    """
    wrong = []
    rates = problem.workload.distribution
    for i in range(rates.shape[0]):
        for j in range(rates.shape[1]):
            shares = [Fraction(float(share)) for share in allocation.shares[i, j]]
            bucket = problem.workload.grid.name(i, j)
            asked = Fraction(int(rates[i, j] * problem.workload.rate_rps > 0))
            if abs(sum(shares) - asked) > _ROUNDING:
                wrong.append(f"{bucket}: served to {float(sum(shares))}, expected {int(asked)}")
            if min(shares) < 0:
                wrong.append(f"{bucket}: a share of {float(min(shares))}")
            for name, share in zip(problem.names, shares):
                if share and not problem.profile.max_rate_rps[name][i, j] > 0:
                    wrong.append(f"{bucket}: {float(share)} of it on {name}, which cannot serve it")
    for name, load in exact_loads(problem, allocation).items():
        count = allocation.counts.get(name, 0)
        if load > count + _ROUNDING * max(1, count):
            wrong.append(f"{name}: a load of {float(load)} on {count} replicas")
    for kind in problem.types:
        count = allocation.counts.get(kind.name, 0)
        if count < 0 or (kind.max_count is not None and count > kind.max_count):
            wrong.append(f"{kind.name}: {count} replicas where {kind.max_count} can be had")
    cost = sum(Fraction(t.price_usd_per_hour) * allocation.counts.get(t.name, 0) for t in problem.types)
    if abs(cost - Fraction(allocation.cost_usd_per_hour)) > Fraction(1, 10**6):
        wrong.append(f"a cost of {allocation.cost_usd_per_hour}, expected {float(cost)}")
    return wrong
