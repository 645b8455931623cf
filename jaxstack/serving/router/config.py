"""The router's settings."""

import dataclasses
from typing import Any
from urllib.parse import urlsplit

from jaxstack.runtime.errors import UserError
from jaxstack.serving.config import ServerConfig


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """Settings of the router. Times are seconds.

    Args:
      replicas: their URLs, `http://HOST:PORT` with or without `/v1`.
      http: the router's own address, keys and limits, and whether it trusts `X-Client-Id`, as a server has them. What
        comes from the router carries that header, so the replicas behind it can trust it.
      replica_api_key: sent to the replicas in the place of the client's; None passes the client's on.
      health_interval_s: between two looks at a replica.
      health_timeout_s: for it to answer.
      failures_allowed: looks in a row that may time out before the replica counts as lost; one that refuses the
        connection is lost at once.
      connect_timeout_s: for a connection to a replica.
      retries: how often a request is sent again from the start because a replica was lost with it, nothing of its
        answer being known yet. (A request that a replica refuses for want of room goes to each of the others.)
      migration_limit: how often an answer that has begun is gone on with by another replica (`migration.py`), where
        replicas are servers of ours; 0 never, and then nothing is done again after the first byte.
      resume_timeout_s: how long such an answer waits for a replica that can go on with it; its client gets comments.
      hold_timeout_s: how long a request waits for a replica that takes requests, instead of being refused at once.
      silence_timeout_s: of a replica that has begun an answer, after which it is given up; servers of ours say at least
        that they are there.
      managed: replicas come and go by `POST /router/replicas`; there may be none at first.
      max_answer_bytes: of an answer that is not streamed.
      peers: URLs of other routers before the same replicas, to share deficits with.
      peer_interval_s: between two looks at their accounts.

    Raises:
      UserError: a value outside its range; the message names the field.
    """

    replicas: tuple[str, ...]
    http: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    replica_api_key: str | None = None
    health_interval_s: float = 1.0
    health_timeout_s: float = 2.0
    failures_allowed: int = 2
    connect_timeout_s: float = 3.0
    retries: int = 2
    migration_limit: int = 3
    resume_timeout_s: float = 30.0
    hold_timeout_s: float = 0.0
    silence_timeout_s: float = 120.0
    managed: bool = False
    max_answer_bytes: int = 256 * 2**20
    peers: tuple[str, ...] = ()
    peer_interval_s: float = 0.25

    def __post_init__(self) -> None:
        if not self.replicas and not self.managed:
            raise UserError("replicas: found none, expected at least one URL")
        for field in ("replicas", "peers"):
            names = [address(url, field) for url in getattr(self, field)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise UserError(f"{field}: found {twice[0]!r} twice, expected each once")
        positive = ("health_interval_s", "health_timeout_s", "connect_timeout_s", "peer_interval_s")
        for name in (*positive, "resume_timeout_s", "silence_timeout_s"):
            _check(getattr(self, name) > 0, name, getattr(self, name), "a positive number of seconds")
        found = self.hold_timeout_s
        _check(0 <= found < float("inf"), "hold_timeout_s", found, "a number of seconds >= 0")
        for name in ("failures_allowed", "retries", "migration_limit"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "an integer >= 0")
        _check(self.max_answer_bytes >= 1, "max_answer_bytes", self.max_answer_bytes, "an integer >= 1")
        key = self.replica_api_key
        _check(key is None or bool(key), "replica_api_key", key, "None or a key that is not empty")


def address(url: str, field: str) -> str:
    """`http://HOST:PORT` of a URL. Raises UserError naming `field`."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.path.rstrip("/") in ("", "/v1")
        good = good and not parts.query and not parts.fragment and parts.username is None
        _ = parts.port  # raises where it is no number
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{field}: found {url!r}, expected http://HOST:PORT")
    return f"{parts.scheme}://{parts.netloc}"


def _check(ok: bool, name: str, found: Any, expected: str) -> None:
    if not ok:
        raise UserError(f"{name}: found {found!r}, expected {expected}")
