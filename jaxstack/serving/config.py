"""The server's settings: where it listens, who may ask, and how much of anything it allows."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_type_hints

from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Settings of the HTTP server. Times are seconds; a limit is the largest value that is still allowed.

    Args:
      host: address to listen on; the loopback address unless others shall reach it.
      port: 0 takes a free one.
      model_name: what clients call the model.
      api_key: if set, requests other than `/health`, `/metrics` and the page must carry it as a bearer token.
      api_keys: further keys, by the name of their owner, under which a scheduling policy counts what they ask. These
        names, and others that clients go by, stand in `/metrics` and on the page.
      trust_client_id: count requests under the name in the header `X-Client-Id`, where their key has no owner. For
        servers that only a gateway can reach; anybody else would choose a new name for each request.
      allowed_origins: web pages of these origins may call (CORS); none by default.
      max_body_bytes: size of a request body.
      max_streams: requests being answered at once, streaming or not; more get 429. The queue has its own limit, the
        engine's `max_waiting`.
      max_connections: open sockets; more are turned away with 503.
      max_choices: prompts times `n` of one request.
      max_stop_strings: entries of `stop`.
      header_timeout_s: for the head of a request to arrive.
      body_timeout_s: for its body to arrive.
      keep_alive_s: how long an idle connection stays open.
      request_timeout_s: cap on the time of one answer; a request may ask for less with `timeout_s`.
      comment_interval_s: a silent stream sends a comment line this often, so that proxies keep it open.
      stall_timeout_s: a client that takes nothing for so long is cut off.
      drain_timeout_s: on shutdown, running requests have this long to finish.
      dead_grace_s: how long a server whose engine has died still answers `/health`.
      tool_parser: how the model writes calls of tools; "auto" goes by its chat template, "none" refuses `tools`.
      reasoning_parser: how it marks its thinking; "auto" goes by its chat template and tokens, "none" leaves the
        thinking in the content.
      pooling: what an embedding is made of: the "last" token's hidden state or the "mean" over all.
      tokenizer_threads: threads for JSON, chat templates and tokenization.

    Raises:
      UserError: a value outside its range; the message names the field.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = "default"
    api_key: str | None = None
    api_keys: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    trust_client_id: bool = False
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_streams: int = 512
    max_connections: int = 2048
    max_choices: int = 256
    max_stop_strings: int = 4
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 5.0
    request_timeout_s: float | None = None
    comment_interval_s: float = 15.0
    stall_timeout_s: float = 60.0
    drain_timeout_s: float = 30.0
    dead_grace_s: float = 5.0
    tool_parser: Literal["auto", "none", "hermes", "llama3", "mistral"] = "auto"
    reasoning_parser: Literal["auto", "none", "think"] = "auto"
    pooling: Literal["last", "mean"] = "last"
    tokenizer_threads: int = 2

    def __post_init__(self) -> None:
        _check(0 <= self.port <= 65535, "port", self.port, "a number from 0 to 65535")
        _check(bool(self.host), "host", self.host, "an address or name")
        _check(bool(self.model_name), "model_name", self.model_name, "a name")
        _check(self.api_key is None or bool(self.api_key), "api_key", self.api_key, "None or a key that is not empty")
        for owner, key in self.api_keys.items():
            _check(bool(owner) and bool(key), f"api_keys[{owner!r}]", "no key" if owner else "no name", "both")
        keys = [*self.api_keys.values(), *([self.api_key] if self.api_key else [])]
        _check(len(set(keys)) == len(keys), "api_keys", "the same key twice", "different keys")
        for name in ("max_body_bytes", "max_streams", "max_connections", "max_choices", "tokenizer_threads"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "an integer >= 1")
        _check(self.max_stop_strings >= 0, "max_stop_strings", self.max_stop_strings, "an integer >= 0")
        for name in ("tool_parser", "reasoning_parser", "pooling"):
            known = get_args(get_type_hints(ServerConfig)[name])
            _check(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(known)}")
        for name in (f.name for f in dataclasses.fields(self) if f.name.endswith("_s")):
            value = getattr(self, name)
            optional = name == "request_timeout_s" and value is None
            zero_allowed = name in ("drain_timeout_s", "dead_grace_s")
            _check(optional or value > 0 or (zero_allowed and value == 0), name, value, "a positive number of seconds")


def _check(ok: bool, name: str, found: Any, expected: str) -> None:
    if not ok:
        raise UserError(f"{name}: found {found!r}, expected {expected}")
