"""The mixed-integer program of an allocation, built by array operations.

Of every bucket b and type g that can serve it there is a column k, how much of the bucket goes there: whole slices of
S, or any share (S = 1, continuous). The S slices of a bucket are interchangeable, so that their number per type says as
much as the paper's binary for each slice and type: any k expands into such an assignment of equal cost, and back, and
the S! ways of naming the slices are gone. Of every type there is a column n, its replicas.

    minimise    sum_g c_g n_g  (+ costs of switching)
    subject to  sum_g k_bg = S                             for every bucket b
                sum_b (r_b / S) L_bg k_bg <= n_g           for every type g

With redundancy there are as many copies of k as ways to lose that many replicas, each with less capacity: y_gj says
whether there are at least j replicas of g, and a loss of j of them leaves n_g - y_g1 - ... - y_gj.
"""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A program over columns [k of each way to lose replicas, n, started, stopped, y].

    Args:
      demand: replicas of each type that each bucket takes alone; infinite where the type cannot serve.
      prices: of the types.
      caps: replicas of each type at most.
      slices: None for shares.
      redundancy: replicas that may be lost.
      current: what is running, where changes cost.
      switch_usd_per_hour: of one replica started, and of one stopped.

    Attributes:
      bucket, kind: of each column k.
      losses: replicas of each type that are lost, for every way to lose `redundancy` of them.
      most: replicas of each type that can be of use.
    """

    demand: Float[np.ndarray, "buckets types"]
    prices: Float[np.ndarray, "types"]
    caps: Float[np.ndarray, "types"]
    slices: int | None = None
    redundancy: int = 0
    current: Int[np.ndarray, "types"] | None = None
    switch_usd_per_hour: tuple[float, float] = (0.0, 0.0)

    bucket: Int[np.ndarray, "pairs"] = dataclasses.field(init=False)
    kind: Int[np.ndarray, "pairs"] = dataclasses.field(init=False)
    losses: list[Int[np.ndarray, "types"]] = dataclasses.field(init=False)
    most: Float[np.ndarray, "types"] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        types = len(self.prices)
        bucket, kind = np.nonzero(np.isfinite(self.demand))
        losses = [np.bincount(np.array(lost, dtype=int), minlength=types) for lost in _ways(types, self.redundancy)]
        set_ = object.__setattr__
        set_(self, "bucket", bucket)
        set_(self, "kind", kind)
        set_(self, "losses", losses)
        # More than would carry all that a type can serve, and the losses, is never of use.
        everything = np.where(np.isfinite(self.demand), self.demand, 0.0).sum(axis=0)
        most = np.ceil(everything) + self.redundancy
        if self.current is not None:
            most = np.maximum(most, self.current)
        set_(self, "most", np.minimum(self.caps, most))

    @property
    def places(self) -> dict[str, slice]:
        """Where the columns of each kind are; those of `k` are of the first way to lose replicas."""
        pairs, types = len(self.bucket), len(self.prices)
        ends = [0, pairs * len(self.losses)]
        for width in (types, *((types, types) if self.current is not None else (0, 0)), types * self.redundancy):
            ends.append(ends[-1] + width)
        found = {name: slice(a, b) for name, a, b in zip(("all_k", "n", "up", "down", "y"), ends, ends[1:])}
        return found | {"k": slice(0, pairs)}

    def solve(
        self,
        *,
        time_limit_s: float,
        relative_gap: float = 0.0,
        objective: Float[np.ndarray, "types"] | None = None,
        rent_usd_per_hour: tuple[float, float] = (0.0, np.inf),
    ) -> scipy.optimize.OptimizeResult:
        """What `scipy.optimize.milp` finds.

        Args:
          objective: of the replicas, in the place of their prices.
          rent_usd_per_hour: what the prices must come to, at least and at most.
        """
        place = self.places
        width, types = place["y"].stop, len(self.prices)
        cost = np.zeros(width)
        cost[place["n"]] = self.prices if objective is None else objective
        upper = np.full(width, np.inf)
        upper[place["all_k"]] = self.slices or 1
        upper[place["n"]] = self.most
        integral = np.zeros(width)
        integral[place["n"]] = 1
        if self.slices:
            integral[place["all_k"]] = 1
        if self.redundancy:
            upper[place["y"]] = integral[place["y"]] = 1
        rows, low, high = self._rows()
        if self.current is not None:
            cost[place["up"]], cost[place["down"]] = self.switch_usd_per_hour
        if rent_usd_per_hour != (0.0, np.inf):
            row = scipy.sparse.csr_array(
                (self.prices, (np.zeros(types, int), np.arange(types) + place["n"].start)), shape=(1, width)
            )
            rows = scipy.sparse.vstack([rows, row], format="csr")
            low, high = np.append(low, rent_usd_per_hour[0]), np.append(high, rent_usd_per_hour[1])
        return scipy.optimize.milp(
            cost,
            integrality=integral,
            bounds=scipy.optimize.Bounds(np.zeros(width), upper),
            constraints=scipy.optimize.LinearConstraint(rows, low, high),
            # With slices, presolving has been seen to end with a "proven" optimum that was none (HiGHS 1.12).
            options={"time_limit": time_limit_s, "mip_rel_gap": relative_gap, "presolve": not self.slices},
        )

    def _rows(self) -> tuple[scipy.sparse.csr_array, np.ndarray, np.ndarray]:
        place = self.places
        buckets, types = self.demand.shape
        pairs, ways = len(self.bucket), len(self.losses)
        slices = self.slices or 1
        way = np.repeat(np.arange(ways), pairs)
        k = np.arange(ways * pairs)
        # Every bucket is served, whatever is lost.
        serve_row = way * buckets + np.tile(self.bucket, ways)
        # No type has more to do than it can.
        able_row = ways * buckets + way * types + np.tile(self.kind, ways)
        load = np.tile(self.demand[self.bucket, self.kind] / slices, ways)
        n_row = ways * buckets + np.arange(ways * types)
        n_column = place["n"].start + np.tile(np.arange(types), ways)
        entries = [(serve_row, k, np.ones(len(k))), (able_row, k, load), (n_row, n_column, -np.ones(len(n_row)))]
        low = [np.full(ways * buckets, slices), np.full(ways * types, -np.inf)]
        high = [np.full(ways * buckets, slices), np.zeros(ways * types)]
        last = ways * (buckets + types)
        if self.redundancy:
            step = np.arange(self.redundancy)
            y = place["y"].start + np.arange(types)[:, None] * self.redundancy + step  # [type, j]
            for number, lost in enumerate(self.losses):
                gone_type, gone_step = np.nonzero(step[None, :] < lost[:, None])
                gone_row = ways * buckets + number * types + gone_type
                entries.append((gone_row, y[gone_type, gone_step], np.ones(len(gone_row))))
            # y_gj is 1 where n_g > j - 1, as far as n_g can be: n_g - (most - j + 1) y_gj <= j - 1.
            row = last + np.arange(types * self.redundancy).reshape(types, -1)
            slack = np.maximum(self.most[:, None] - step, 0.0)
            column = np.repeat(place["n"].start + np.arange(types), self.redundancy)
            entries += [(row.ravel(), column, np.ones(row.size)), (row.ravel(), y.ravel(), -slack.ravel())]
            low.append(np.full(row.size, -np.inf))
            high.append(np.tile(step.astype(float), types))
            last += row.size
        if self.current is not None:
            row = last + np.arange(types)
            column = np.arange(types)
            for name, sign in (("n", 1.0), ("up", -1.0), ("down", 1.0)):
                entries.append((row, place[name].start + column, np.full(types, sign)))
            low.append(self.current.astype(float))
            high.append(self.current.astype(float))
            last += types
        row_, column_, value = (np.concatenate(parts) for parts in zip(*entries))
        matrix = scipy.sparse.csr_array((value, (row_, column_)), shape=(last, place["y"].stop))
        return matrix, np.concatenate(low), np.concatenate(high)

    def relaxed_counts(self) -> Float[np.ndarray, "types"] | None:
        """Replicas of the continuous relaxation, rounded up: a plan, if the caps have room for it and nothing may be
        lost. Any losses are added to every type that is used.
        """
        relaxed = dataclasses.replace(self, redundancy=0, slices=None, current=None)
        place = relaxed.places
        rows, low, high = relaxed._rows()
        width = place["y"].stop
        cost = np.zeros(width)
        cost[place["n"]] = self.prices
        upper = np.ones(width)
        upper[place["n"]] = self.caps
        found = scipy.optimize.milp(
            cost,
            bounds=scipy.optimize.Bounds(np.zeros(width), upper),
            constraints=scipy.optimize.LinearConstraint(rows, low, high),
        )
        if found.x is None:
            return None
        counts = np.ceil(found.x[place["n"]] - 1e-9)
        counts += np.where(counts > 0, self.redundancy, 0)
        return counts if (counts <= self.caps).all() else None


def even_shares(
    demand: Float[np.ndarray, "buckets types"], counts: Sequence[int] | Float[np.ndarray, "types"]
) -> tuple[Float[np.ndarray, "buckets types"], float] | None:
    """Shares of the buckets that load what is rented as evenly as can be, and the load of the fullest type.

    Minimises rho with sum_b demand_bg x_bg <= rho n_g. None where some bucket has no rented type that can serve it.
    """
    counts_ = np.asarray(counts, dtype=float)
    buckets, types = demand.shape
    bucket, kind = np.nonzero(np.isfinite(demand) & (counts_ > 0))
    if len(np.unique(bucket)) < buckets:
        return None
    if not buckets:
        return np.zeros((0, types)), 0.0
    pairs = len(bucket)
    # Loads in units of the type's count, so that the right-hand side is rho alone.
    load = demand[bucket, kind] / counts_[kind]
    serve = scipy.sparse.csr_array((np.ones(pairs), (bucket, np.arange(pairs))), shape=(buckets, pairs + 1))
    able_row = np.concatenate([kind, np.arange(types)])
    able_column = np.concatenate([np.arange(pairs), np.full(types, pairs)])
    able = scipy.sparse.csr_array(
        (np.concatenate([load, -np.ones(types)]), (able_row, able_column)), shape=(types, pairs + 1)
    )
    found = scipy.optimize.linprog(
        np.append(np.zeros(pairs), 1.0), A_ub=able, b_ub=np.zeros(types), A_eq=serve, b_eq=np.ones(buckets),
        bounds=(0, None), method="highs",
    )  # fmt: skip
    if found.x is None:
        return None
    shares = np.zeros((buckets, types))
    shares[bucket, kind] = np.maximum(found.x[:pairs], 0.0)
    shares /= shares.sum(axis=1, keepdims=True)
    taken = np.where(np.isfinite(demand), demand, 0.0) * shares
    busy = counts_ > 0
    return shares, float((taken.sum(axis=0)[busy] / counts_[busy]).max(initial=0.0))


def _ways(types: int, lost: int) -> list[tuple[int, ...]]:
    """Every way to lose so many replicas: which types they are of."""
    return list(itertools.combinations_with_replacement(range(types), lost))
