"""How much service a client may still ask of each replica before it has to go elsewhere.

Deficit round robin, a row for each client: service is charged to (client, replica), and when no replica of the row has
anything left, all of them get one quantum more (arXiv 2501.14312, Algorithm 2). A row is refilled alone, for these
deficits say where a client's requests go, not whose turn it is; the replicas see to that.

Several routers share the rows. Each keeps two counters for an entry that only grow, what it granted and what it
charged; the deficit is the sum of grants less the sum of charges over all routers. So it does not matter in which
order, or how often, their counters arrive.
"""

import collections
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxstack.runtime.errors import UserError

# Whoever finds no room shares a row.
EVERYBODY_ELSE = "(others)"


@dataclasses.dataclass
class _Counters:
    """Of one router for one row: replica -> [granted, charged]. A row that was given up and comes back is born again,
    and its counters begin at zero.
    """

    born: int
    counts: dict[str, list[int]] = dataclasses.field(default_factory=dict)


class ReplicaDeficits:
    """See the module's docstring.

    Args:
      quantum: service granted at a time.
      max_clients: rows. Beyond it the row idle for longest that owes nothing is given up; if all owe, or are busy, new
        clients share one row, and `crowded` counts them.
    """

    def __init__(self, quantum: int, max_clients: int = 10_000):
        if not isinstance(quantum, int) or quantum < 1:
            raise UserError(f"quantum: found {quantum!r}, expected an integer >= 1")
        if max_clients < 1:
            raise UserError(f"max_clients: found {max_clients!r}, expected an integer >= 1")
        self.quantum, self._max_clients = quantum, max_clients
        self.crowded = 0
        self._rows: dict[str, dict[str, int]] = {}
        self._busy: collections.Counter[str] = collections.Counter()
        self._idle: dict[str, None] = {}  # the one idle for longest first
        # What passes between routers.
        self._own: dict[str, _Counters] = {}
        self._version = 0
        self._changed: dict[str, int] = {}
        self._others: dict[str, dict[str, _Counters]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def deficit(self, client: str, replica: str) -> int:
        """Service left; below zero what is owed."""
        return self._rows.get(client, {}).get(replica, 0)

    def row(self, client: str) -> dict[str, int]:
        return dict(self._rows.get(client, {}))

    def clients(self) -> list[str]:
        return list(self._rows)

    def admit(self, client: str) -> str:
        """The row that `client` has, or gets, or shares."""
        if client in self._rows:
            return client
        if len(self._rows) >= self._max_clients:
            gone = next((name for name in self._idle if min(self._rows[name].values(), default=0) >= 0), None)
            if gone is None:
                self.crowded += 1
                client = EVERYBODY_ELSE
            else:
                self._forget(gone)
        if client not in self._rows:
            self._rows[client] = {}
            self._idle[client] = None
        return client

    def begin(self, row: str) -> None:
        """A request of the row has been sent to a replica."""
        self._busy[row] += 1
        self._idle.pop(row, None)

    def end(self, row: str) -> None:
        """It is over."""
        self._busy[row] -= 1
        if self._busy[row] <= 0:
            del self._busy[row]
            self._idle[row] = None

    def with_credit(self, row: str, replicas: Iterable[str]) -> list[str]:
        """The replicas at which the row has a deficit above zero; refills the row when there is none."""
        names = list(replicas)
        have = self._rows[row]
        highest = max(have.get(name, 0) for name in names)
        if highest <= 0:
            rounds = -highest // self.quantum + 1
            for name in names:
                self._add(row, name, granted=rounds * self.quantum)
        return [name for name in names if have.get(name, 0) > 0]

    def charge(self, row: str, replica: str, service: int) -> None:
        """Takes service off; a negative one gives some back."""
        if service > 0:
            self._add(row, replica, charged=service)
        elif service < 0:
            self._add(row, replica, granted=-service)

    # Between routers.

    def changes(self, since: int = 0) -> dict[str, Any]:
        """This router's own counters of the rows that changed after version `since`, for JSON."""
        changed = [row for row, version in self._changed.items() if version > since]
        return {"version": self._version, "rows": {row: dataclasses.asdict(self._own[row]) for row in changed}}

    def merge(self, router: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """Takes in the `changes` of another router. Older ones than are known change nothing.

        Raises:
          KeyError, TypeError, ValueError: these are no counters.
        """
        known = self._others.setdefault(router, {})
        for name, told in rows.items():
            fresh = _Counters(int(told["born"]), {r: [int(g), int(c)] for r, (g, c) in told["counts"].items()})
            before = known.get(name, _Counters(fresh.born))
            if fresh.born < before.born:
                continue
            if fresh.born > before.born:
                self._take_in(name, before, -1)
                before = _Counters(fresh.born)
            for replica, counts in before.counts.items():
                newer = fresh.counts.setdefault(replica, counts)
                newer[:] = [max(old, new) for old, new in zip(counts, newer)]
            self.admit(name)
            self._take_in(name, before, -1)
            self._take_in(name, fresh, 1)
            known[name] = fresh

    def forget_router(self, router: str) -> None:
        """Another router has restarted: what it had counted is void."""
        for name, counters in self._others.pop(router, {}).items():
            self._take_in(name, counters, -1)

    def _take_in(self, name: str, counters: _Counters, sign: int) -> None:
        row = self._rows.get(name)
        if row is not None:
            for replica, (granted, charged) in counters.counts.items():
                row[replica] = row.get(replica, 0) + sign * (granted - charged)

    def _add(self, row: str, replica: str, granted: int = 0, charged: int = 0) -> None:
        have = self._rows[row]
        have[replica] = have.get(replica, 0) + granted - charged
        self._version += 1
        self._changed[row] = self._version
        own = self._own.get(row)
        if own is None:
            own = self._own[row] = _Counters(self._version)
        counts = own.counts.setdefault(replica, [0, 0])
        counts[0] += granted
        counts[1] += charged

    def _forget(self, row: str) -> None:
        del self._rows[row], self._idle[row]
        self._own.pop(row, None)
        self._changed.pop(row, None)
        for theirs in self._others.values():
            theirs.pop(row, None)
