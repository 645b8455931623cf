"""Who has credit and who is in debt: the deficits of deficit round robin, kept so that no debt is ever forgotten."""

import collections
from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from jaxstack.engine.scheduling.cost import check_integer
from jaxstack.runtime.errors import UserError

Key = TypeVar("Key", bound=Hashable)


class DeficitLedger(Generic[Key]):
    """A deficit for every key (a client; a client and a replica): above 0 it has credit, else it is a debtor.

    A new key starts at 0. A refill is for *every* debtor, whether it waits, runs or is idle: one that sends a wave and
    goes idle would otherwise pay for it twice, and one whose debt were wiped would not pay at all. So a key leaves only
    when the ledger is full, and then only one that is idle and owes nothing, the longest idle first. If there is none,
    new keys share one account; they do so until its debts are paid and there is room again.

    Args:
      quantum: what a refill grants a key of weight 1. May be changed; it holds from the next refill on.
      weights: shares of keys, integers >= 1; of others 1.
      max_clients: keys with an account of their own.

    Attributes:
      largest_quantum: the largest so far.
      crowded: how many keys had to share an account.

    Raises:
      UserError: a value outside its range; the message names it.
    """

    def __init__(self, quantum: int, weights: Mapping[Key, int] = MappingProxyType({}), max_clients: int = 10_000):
        check_integer("max_clients", max_clients, 1)
        self.weights = check_weights(weights)
        self.largest_quantum = 0
        self.quantum = quantum
        self.crowded = 0
        self._max_clients = max_clients
        self._deficits: dict[Key | _Shared, int] = {}
        self._debtors: dict[Key | _Shared, None] = {}
        self._idle: collections.OrderedDict[Key, None] = collections.OrderedDict()
        self._guests: dict[Key, None] = {}  # keys whose account is the shared one

    @property
    def quantum(self) -> int:
        return self._quantum

    @quantum.setter
    def quantum(self, value: int) -> None:
        check_integer("quantum", value, 1)
        self._quantum = value
        self.largest_quantum = max(self.largest_quantum, value)

    def __len__(self) -> int:
        return len(self._deficits)

    def deficit(self, key: Key) -> int:
        """The credit of `key` (a debt if it is below 0); 0 of one that was never seen."""
        return self._deficits.get(self._account(key), 0)

    def seen(self, key: Key) -> None:
        """`key` has something to do (again)."""
        self._idle.pop(key, None)
        if key in self._deficits:
            return
        if self._deficits.get(_SHARED, 0) >= 0 and self._room():
            self._guests.pop(key, None)
            self._set(key, 0)
        elif key not in self._guests:
            self._guests[key] = None
            self.crowded += 1
            self._set(_SHARED, self._deficits.get(_SHARED, 0))

    def idle(self, key: Key) -> None:
        """`key` has nothing to do any more. Its deficit stays."""
        if key in self._deficits:
            self._idle[key] = None

    def charge(self, key: Key, service: int) -> None:
        """Takes `service` from the deficit of `key`; what is negative is given back."""
        if key not in self._deficits and key not in self._guests:
            self.seen(key)
        account = self._account(key)
        self._set(account, self._deficits[account] - service)

    def refill_debtors(self, rounds: int = 1, among: Iterable[Key] | None = None) -> None:
        """Grants `weight * quantum` to every key with a deficit <= 0, `rounds` times over.

        Args:
          among: grant it to these only (the replicas of one client, in a router).
        """
        chosen: list[Key | _Shared]
        if among is None:
            chosen = list(self._debtors)
        else:
            chosen = list({self._account(key): None for key in among})
            for key in chosen:
                if key not in self._deficits:
                    self._set(key, 0)
        for key in chosen:
            deficit = self._deficits[key]
            if deficit <= 0:
                grant = self._grant(key)
                self._set(key, deficit + min(rounds, -deficit // grant + 1) * grant)

    def refill_until_credit(self, keys: Iterable[Key]) -> int:
        """As many refills of every debtor as it takes until one of `keys`, which are all in debt, has credit.

        Returns: how many that were.
        """
        accounts = {self._account(key): None for key in keys}
        rounds = min(-self._deficits.get(key, 0) // self._grant(key) + 1 for key in accounts)
        self.refill_debtors(rounds)
        return rounds

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs, as plain lists and numbers."""
        return {
            "quantum": self.quantum,
            "largest_quantum": self.largest_quantum,
            "deficits": [[key, value] for key, value in list(self._deficits.items()) if key is not _SHARED],
            "shared": self._deficits.get(_SHARED, 0),
            "guests": list(self._guests),
            "idle": list(self._idle),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Goes on from a snapshot. JSON makes lists of keys that are tuples: undo that first."""
        self.quantum = snapshot["quantum"]
        self.largest_quantum = max(self.largest_quantum, snapshot["largest_quantum"])
        self._deficits, self._debtors = {}, {}
        for key, value in snapshot["deficits"]:
            self._set(key, value)
        self._guests = dict.fromkeys(snapshot["guests"])
        if self._guests or snapshot["shared"]:
            self._set(_SHARED, snapshot["shared"])
        self._idle = collections.OrderedDict.fromkeys(snapshot["idle"])

    def deficits(self) -> dict[Key, int]:
        """Every account by its key; those who share one are left out. Callable from any thread."""
        return {key: value for key, value in list(self._deficits.items()) if not isinstance(key, _Shared)}

    def _account(self, key: Key) -> "Key | _Shared":
        return _SHARED if key in self._guests else key

    def _grant(self, key: "Key | _Shared") -> int:
        return self._quantum * (1 if isinstance(key, _Shared) else self.weights.get(key, 1))

    def _set(self, key: "Key | _Shared", deficit: int) -> None:
        self._deficits[key] = deficit
        if deficit <= 0:
            self._debtors[key] = None
        else:
            self._debtors.pop(key, None)

    def _room(self) -> bool:
        """Whether a new key can have an account; makes room for it if somebody may leave."""
        if len(self._deficits) - (_SHARED in self._deficits) < self._max_clients:
            return True
        leaver = next((key for key in self._idle if self._deficits[key] >= 0), None)
        if leaver is None:
            return False
        del self._idle[leaver], self._deficits[leaver]
        self._debtors.pop(leaver, None)
        return True


class _Shared:
    """The key of the account of those who have none of their own."""


_SHARED = _Shared()


def check_weights(weights: Mapping[Any, int]) -> dict[Any, int]:
    """A copy of `weights`. Raises UserError for one that is no integer >= 1."""
    for key, weight in weights.items():
        if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
            raise UserError(f"weights[{key!r}]: found {weight!r}, expected an integer >= 1")
    return dict(weights)
