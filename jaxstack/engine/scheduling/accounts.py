"""What every client has had: service, starts, waiting time, and how many of its requests wait."""

import collections
import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass
class ClientAccount:
    """Of one client, since the start.

    Attributes:
      service: given, in the scheduler's `ServiceCost`.
      starts, wait_s: requests that have started, and how long they waited for it altogether.
      open: choices that wait or run.
    """

    service: int = 0
    starts: int = 0
    wait_s: float = 0.0
    open: int = 0


class ClientAccounts:
    """The accounts of all clients; beyond `max_clients` those idle for longest are added up under `OTHERS`."""

    OTHERS = "(others)"

    def __init__(self, max_clients: int = 10_000):
        self._max_clients = max_clients
        self._accounts: dict[str, ClientAccount] = {}
        self._idle: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._waiting: dict[str, int] = {}
        self._since: dict[str, int] = {}

    @property
    def waiting(self) -> Mapping[str, int]:
        """How many requests of each client wait; only those with some."""
        return self._waiting

    def arrived(self, client: str) -> None:
        self._idle.pop(client, None)
        if client not in self._accounts and len(self._accounts) >= self._max_clients and self._idle:
            gone = self._accounts.pop(self._idle.popitem(last=False)[0])
            others = self._accounts.setdefault(self.OTHERS, ClientAccount())
            others.service += gone.service
            others.starts += gone.starts
            others.wait_s += gone.wait_s
        self._accounts.setdefault(client, ClientAccount()).open += 1
        self.waits(client)

    def waits(self, client: str) -> None:
        self._waiting[client] = self._waiting.get(client, 0) + 1

    def waits_no_more(self, client: str) -> None:
        left = self._waiting[client] - 1
        if left:
            self._waiting[client] = left
        else:
            del self._waiting[client]

    def started(self, client: str, wait_s: float) -> None:
        account = self._accounts[client]
        account.starts += 1
        account.wait_s += wait_s

    def given(self, client: str, service: int) -> None:
        self._accounts[client].service += service
        self._since[client] = self._since.get(client, 0) + service

    def left(self, client: str) -> None:
        account = self._accounts[client]
        account.open -= 1
        if not account.open and client != self.OTHERS:
            self._idle[client] = None

    def take(self) -> dict[str, int]:
        """The service given to each client since the last call."""
        since, self._since = self._since, {}
        return since

    def all(self) -> dict[str, ClientAccount]:
        """A copy, callable from any thread."""
        return {client: dataclasses.replace(account) for client, account in list(self._accounts.items())}
