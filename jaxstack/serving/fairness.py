"""The engine's accounts of clients as rows for people and for Prometheus, of which there must not be too many."""

import dataclasses
from collections.abc import Collection

from jaxstack.engine import FairnessReading
from jaxstack.serving.clients import ANONYMOUS

OTHERS = "other"


@dataclasses.dataclass
class ClientRow:
    """One client; `deficit` is None where the policy keeps none."""

    client: str
    service: int = 0
    waiting: int = 0
    starts: int = 0
    wait_s: float = 0.0
    deficit: int | None = None


def of_clients(reading: FairnessReading, limit: int = 50, first: Collection[str] = ()) -> list[ClientRow]:
    """A row for each of `limit` clients, and for all others added up. Who has had most comes first, but for those in
    `first`, who are never among the others.
    """
    accounts = sorted(
        reading.clients.items(), key=lambda item: ((item[0] or ANONYMOUS) not in first, -item[1].service, item[0])
    )
    rows: dict[str, ClientRow] = {}
    for client, account in accounts:
        name = client or ANONYMOUS
        if name not in rows and len(rows) >= limit:
            name = OTHERS
        row = rows.setdefault(name, ClientRow(name))
        row.service += account.service
        row.waiting += reading.waiting.get(client, 0)
        row.starts += account.starts
        row.wait_s += account.wait_s
        if client in reading.deficits:
            row.deficit = (row.deficit or 0) + reading.deficits[client]
    return list(rows.values())
