"""Routing over replicas of different kinds: how much of a replica a request takes depends on both.

The router is given plain tables of each kind and knows nothing of prices. A request's output length is not known when
it arrives: for every bucket of input lengths there is a histogram of the output lengths of late, and what is expected
of a request is the mean over it (not the value at the mean length, since load is convex in it), none longer than the
request may become. Plain Python, deterministic for a seed.
"""

import bisect
import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.policies import ReplicaView, RoutedRequest, RoutingPolicy

Rule = Literal["occupancy", "plan", "throughput", "profiled_load", "spill"]
RULES: tuple[Rule, ...] = ("occupancy", "plan", "throughput", "profiled_load", "spill")

Table = Mapping[str, Sequence[Sequence[float]]]
"""By kind of replica: rows of input buckets, columns of output buckets."""

_View = TypeVar("_View", bound=ReplicaView)

# A kind is fit for a request where it can serve so much of the histogram.
_ABLE_SHARE = 0.95


@dataclasses.dataclass(frozen=True)
class RoutingTable:
    """What a router must know of the kinds of replicas.

    Args:
      input_edges_tokens, output_edges_tokens: upper edges of the buckets.
      max_rate_rps: what one replica sustains of each bucket; 0: it cannot serve it.
      concurrency: requests under way on it then.
      shares: of each bucket, what is planned for each kind.
      output_weights: of each input bucket, the planned distribution over output buckets; rows need not sum to 1.

    Raises:
      UserError: a table of another shape than the edges, or of other kinds.
    """

    input_edges_tokens: tuple[int, ...]
    output_edges_tokens: tuple[int, ...]
    max_rate_rps: Table
    concurrency: Table
    shares: Table
    output_weights: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        rows, columns = len(self.input_edges_tokens), len(self.output_edges_tokens)
        kinds = set(self.max_rate_rps)
        tables = [(name, table) for name in ("max_rate_rps", "concurrency", "shares")
                  for table in getattr(self, name).values()]  # fmt: skip
        for name, table in [*tables, ("output_weights", self.output_weights)]:
            if len(table) != rows or any(len(row) != columns for row in table):
                raise UserError(f"routing table: {name}: found another shape than {rows} x {columns}, as the edges say")
        for name in ("concurrency", "shares"):
            if set(getattr(self, name)) != kinds or not kinds:
                raise UserError(f"routing table: {name}: found other kinds than max_rate_rps, expected the same ones")

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.max_rate_rps)

    def as_json(self) -> dict[str, Any]:
        return {"version": 1, **dataclasses.asdict(self)}

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTable":
        """The table in a JSON file that `as_json` made.

        Raises:
          UserError: no such file, no such table.
        """
        try:
            found = json.loads(Path(path).read_text())
            if found.pop("version") != 1:
                raise UserError(f"{path}: found another version, expected 1")
            found |= {name: tuple(found[name]) for name in ("input_edges_tokens", "output_edges_tokens")}
            return cls(**found)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({type(error).__name__}), expected a routing table") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path}: found no routing table ({error})") from None


class OutputLengths:
    """Histograms of output lengths for each input bucket, in which what is older counts less.

    Args:
      half_life: requests after which one counts half.
      prior: what to begin with: rows of weights.
    """

    def __init__(self, edges: Sequence[int], prior: Sequence[Sequence[float]], half_life: float = 1000.0):
        self._edges = tuple(edges)
        self._keep = 0.5 ** (1 / half_life)
        self._weights = []
        whole = [sum(column) for column in zip(*prior)]
        for row in prior:
            # A size that nobody planned for is expected to be answered like all others.
            row = list(row) if sum(row) > 0 else whole
            total = sum(row) or 1.0
            self._weights.append([weight / total for weight in row] if sum(row) > 0 else [1 / len(row)] * len(row))

    def column(self, output_tokens: int) -> int:
        """Its bucket; what is beyond the last edge counts as the last."""
        return min(bisect.bisect_left(self._edges, output_tokens), len(self._edges) - 1)

    def add(self, row: int, output_tokens: int) -> None:
        weights = self._weights[row]
        rest = 1 - self._keep
        for j in range(len(weights)):
            weights[j] *= self._keep
        weights[self.column(output_tokens)] += rest

    def expected(self, row: int, max_tokens: int | None = None) -> list[float]:
        """The distribution over output buckets of a request that may have `max_tokens`."""
        weights = self._weights[row]
        if max_tokens is None:
            return weights
        last = self.column(max_tokens)
        return [*weights[:last], sum(weights[last:])] + [0.0] * (len(weights) - last - 1)


@dataclasses.dataclass(slots=True)
class _Charge:
    row: int
    occupancy: float
    load: float


class MixedFleet(RoutingPolicy):
    """Chooses among replicas of several kinds.

    An unfinished request occupies 1 / C of its replica, where C is how many of its size are under way at the highest
    rate; its load is 1 / T, the inverse of that rate. By `rule`:

      occupancy: the replica, of any kind that can serve the request, that is least occupied with it.
      plan: a kind drawn by the plan's shares, and of it the least occupied.
      throughput: a replica drawn with weights T at the mean output length (Melange's balancer).
      profiled_load: the least sum of loads. It forgets how long a request stays.
      spill: by plan, unless the replica would be more than full; then by occupancy.

    Args:
      kinds: of every replica, by its name.
      half_life: of output lengths, in requests.
      seed: of what is drawn.

    Raises:
      UserError: a replica of a kind that the table does not have.
    """

    def __init__(
        self,
        table: RoutingTable,
        kinds: Mapping[str, str],
        rule: Rule = "occupancy",
        *,
        half_life: float = 1000.0,
        seed: int = 0,
    ):
        if rule not in RULES:
            raise UserError(f"rule: found {rule!r}, expected one of {', '.join(RULES)}")
        for name, kind in kinds.items():
            if kind not in table.kinds:
                raise UserError(f"{name}: found kind {kind!r}, expected one of {', '.join(table.kinds)}")
        if not half_life > 0:
            raise UserError(f"half_life: found {half_life}, expected a positive number of requests")
        self.table, self.rule = table, rule
        self._kinds = dict(kinds)
        self._lengths = OutputLengths(table.output_edges_tokens, table.output_weights, half_life)
        self._random = random.Random(seed)
        self._occupied: dict[str, float] = {}
        self._loaded: dict[str, float] = {}
        self._charges: dict[RoutedRequest, _Charge] = {}

    def choose(self, request: RoutedRequest, replicas: Sequence[_View]) -> _View:
        row = self._row(request)
        weights = self._lengths.expected(row, request.max_tokens)
        present = {self._kinds[replica.name] for replica in replicas}
        # In the table's order: a set's would differ from run to run, and with it what is drawn.
        takes = {kind: self._expected("occupancy", kind, row, weights) for kind in self.table.kinds if kind in present}
        able = {kind for kind, taken in takes.items() if math.isfinite(taken)}
        if not able:  # nobody should: whoever is least busy tries
            return min(replicas, key=lambda replica: replica.active)
        usable = [replica for replica in replicas if self._kinds[replica.name] in able]
        if self.rule == "throughput":
            return self._by_throughput(row, weights, usable)
        if self.rule == "profiled_load":
            loads = {kind: self._expected("load", kind, row, weights) for kind in able}
            return min(usable, key=lambda r: (self._loaded.get(r.name, 0.0) + loads[self._kinds[r.name]], r.name))

        def occupied(replica: ReplicaView) -> tuple[float, str]:
            return self._occupied.get(replica.name, 0.0) + takes[self._kinds[replica.name]], replica.name

        if self.rule != "occupancy":
            planned = self._planned_kind(row, weights, [kind for kind in takes if kind in able])
            chosen = min((r for r in usable if self._kinds[r.name] == planned), key=occupied)
            if self.rule == "plan" or occupied(chosen)[0] <= 1:
                return chosen
        return min(usable, key=occupied)

    def on_dispatch(self, request: RoutedRequest, replica: ReplicaView) -> None:
        row = self._row(request)
        weights = self._lengths.expected(row, request.max_tokens)
        kind = self._kinds[replica.name]
        occupancy, load = (self._expected(what, kind, row, weights) for what in ("occupancy", "load"))
        # One that cannot serve it is full with it.
        charge = _Charge(row, occupancy if math.isfinite(occupancy) else 1.0, load if math.isfinite(load) else 1.0)
        self._charges[request] = charge
        self._occupied[replica.name] = self._occupied.get(replica.name, 0.0) + charge.occupancy
        self._loaded[replica.name] = self._loaded.get(replica.name, 0.0) + charge.load

    def on_finish(
        self,
        request: RoutedRequest,
        replica: ReplicaView,
        cached_tokens: int | None,
        output_tokens: int,
        prompt_tokens: int | None = None,
    ) -> None:
        charge = self._give_back(request, replica)
        self._lengths.add(charge.row, output_tokens)

    def on_failed(self, request: RoutedRequest, replica: ReplicaView) -> None:
        self._give_back(request, replica)

    def occupancy(self, name: str) -> float:
        """How full a replica is: 1 where its profile ends."""
        return self._occupied.get(name, 0.0)

    def report(self) -> dict[str, Any]:
        return {"rule": self.rule, "occupancy": {name: round(self.occupancy(name), 4) for name in sorted(self._kinds)}}

    # Inside.

    def _give_back(self, request: RoutedRequest, replica: ReplicaView) -> _Charge:
        charge = self._charges.pop(request)
        # Sums of floats do not return to nought by themselves.
        self._occupied[replica.name] = max(0.0, self._occupied[replica.name] - charge.occupancy)
        self._loaded[replica.name] = max(0.0, self._loaded[replica.name] - charge.load)
        return charge

    def _row(self, request: RoutedRequest) -> int:
        edges = self.table.input_edges_tokens
        return min(bisect.bisect_left(edges, request.prompt_tokens), len(edges) - 1)

    def _expected(self, what: str, kind: str, row: int, weights: Sequence[float]) -> float:
        """What a request takes of a replica of that kind on average; infinite where it cannot be served.

        With a rate T of the whole mixture E[1/T] replicas are full, and by Little's law E[C/T] requests are under way
        on them: long answers are under way more often than they arrive.
        """
        load = under_way = able = 0.0
        rates, concurrency = self.table.max_rate_rps[kind][row], self.table.concurrency[kind][row]
        for weight, rate, number in zip(weights, rates, concurrency):
            if rate > 0:
                load += weight / rate
                under_way += weight * number / rate
                able += weight
        if able <= 0 or able < _ABLE_SHARE * sum(weights):
            return math.inf
        return load / under_way if what == "occupancy" else load / able

    def _planned_kind(self, row: int, weights: Sequence[float], able: Sequence[str]) -> str:
        """Drawn so that each kind has the part of its work that the plan gives it; by what they sustain where the plan
        has none for these lengths.

        The plan may send the short answers of a row to one kind and the long ones to another, which nobody can do who
        does not know them: as many requests would be far more work than planned. So shares are weighed by loads.
        """
        planned = []
        for kind in able:
            rates, shares = self.table.max_rate_rps[kind][row], self.table.shares[kind][row]
            work = [w / rate if rate > 0 else 0.0 for w, rate in zip(weights, rates)]
            planned.append(sum(w * share for w, share in zip(work, shares)) / sum(work))
        if sum(planned) <= 0:
            planned = [1 / self._expected("load", kind, row, weights) for kind in able]
        return self._random.choices(able, planned)[0]

    def _by_throughput(self, row: int, weights: Sequence[float], usable: Sequence[_View]) -> _View:
        edges = self.table.output_edges_tokens
        mean = sum(weight * edge for weight, edge in zip(weights, edges)) / sum(weights)
        column = self._lengths.column(round(mean))
        rates = [self.table.max_rate_rps[self._kinds[replica.name]][row][column] for replica in usable]
        return self._random.choices(usable, rates if sum(rates) > 0 else None)[0]
