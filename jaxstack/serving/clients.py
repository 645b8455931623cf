"""Whose request it is: the name under which a scheduling policy keeps a client's account."""

import dataclasses
import hmac

from jaxstack.serving.config import ServerConfig
from jaxstack.serving.exchange import Exchange

ANONYMOUS = "anonymous"
"""Those of whom nothing is known."""

# Of names that clients choose themselves.
_LONGEST_NAME = 128


@dataclasses.dataclass(frozen=True)
class Caller:
    """What is known of who asks.

    Attributes:
      owner: of the API key; None if the key is nobody's or none is needed.
      named: the header `X-Client-Id`, where the server trusts it.
      address: of the other end of the connection.
      reserved: names that only the owner of a key goes by.
    """

    owner: str | None = None
    named: str | None = None
    address: str | None = None
    reserved: frozenset[str] = frozenset()

    def client(self, user: str | None) -> str:
        """The client's name: the key's owner, else what it says in the header, else OpenAI's field `user`, else its
        address. A name that belongs to the owner of a key is set apart from it.
        """
        if self.owner is not None:
            return self.owner
        name = (self.named or "").strip() or (user or "").strip() or self.address or ANONYMOUS
        # Half a surrogate pair could not be written into metrics.
        name = name[:_LONGEST_NAME].encode("utf-8", "replace").decode("utf-8")
        return f"user:{name}" if name in self.reserved else name

    @property
    def tenant(self) -> str:
        """Whose answers may be given to it: those of the key's owner, or of the client that a gateway vouches for;
        "" is everybody else together. Nothing that the request itself says counts.
        """
        if self.owner is not None:
            return f"key:{self.owner}"
        named = (self.named or "").strip()
        return f"client:{named}" if named else ""


def caller_of(exchange: Exchange, config: ServerConfig) -> Caller:
    """Who asks in an exchange whose key has been checked."""
    peer = exchange.scope.get("client")
    return Caller(
        owner=exchange.owner,
        named=exchange.headers.get("x-client-id") if config.trust_client_id else None,
        address=peer[0] if peer else None,
        reserved=frozenset(config.api_keys),
    )


def key_fits(given: str, config: ServerConfig) -> tuple[bool, str | None]:
    """Whether `given` is a key of the server, and whose. Takes the same time for every wrong key."""
    right, owner = False, None
    for name, key in [(None, config.api_key), *config.api_keys.items()]:
        if key is not None and hmac.compare_digest(given.encode("utf-8"), key.encode("utf-8")):
            right, owner = True, name
    return right, owner
