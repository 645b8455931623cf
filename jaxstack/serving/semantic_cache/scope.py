"""A request reduced to what the cache compares: who asks and what must match exactly, and the text that may differ.

Nothing is looked up but inside a scope, and the tenant is part of every scope: that tenants never see each other's
answers does not hang on a filter.
"""

import dataclasses
import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.config import CacheConfig

Mode = Literal["on", "off", "read", "refresh"]
MODES = ("on", "off", "read", "refresh")

# Fields of a body that do not change the answer's text.
_NO_MATTER = {"cache", "metadata", "prompt_cache_key", "prompt_cache_retention", "priority", "safety_identifier"}
_NO_MATTER |= {"service_tier", "stream", "stream_options", "store", "user"}
# Fields with a place of their own.
_ELSEWHERE = {"messages", "prompt", "model", "tools", "tool_choice", "response_format"}
# Values that ask for nothing: as if the field were not there.
_DEFAULTS: dict[str, Any] = {"n": 1, "best_of": 1, "logprobs": False, "top_p": 1, "frequency_penalty": 0}
_DEFAULTS |= {"presence_penalty": 0, "echo": False, "continue_final_message": False, "return_token_ids": False}
_LAST_TURNS = 4
# What a request may ask for: thirty years. No date can be made of much more.
_LONGEST_TTL_S = 1e9


@dataclasses.dataclass(frozen=True)
class CacheRequest:
    """What a lookup takes. Made by `CacheScope`.

    Attributes:
      owner: whose entries may answer.
      text: what is embedded; "" for none.
      scope: digest of what must be equal for texts to be compared.
      exact: digest of the whole request.
      mode: "on"; "read" keeps nothing; "refresh" answers nothing from the cache; "off" does neither.
      delta, ttl_s: as the request asks for; None for the cache's own.
      bypass: why the cache has no part in it; None if it has.
    """

    owner: str
    model: str
    text: str
    scope: bytes
    exact: bytes
    mode: Mode = "on"
    delta: float | None = None
    ttl_s: float | None = None
    bypass: str | None = None

    @property
    def partition(self) -> tuple[str, bytes]:
        return self.owner, self.scope


class CacheScope:
    """Makes requests comparable, under one configuration."""

    def __init__(self, config: CacheConfig):
        self._config = config

    def prompt(
        self,
        text: str,
        *,
        tenant: str = "",
        model: str = "",
        system: str = "",
        sampling: Mapping[str, Any] | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> CacheRequest:
        """Of a bare prompt, for programs without an HTTP server."""
        messages = [{"role": "system", "content": system}] if system else []
        body = {**(sampling or {}), "messages": [*messages, {"role": "user", "content": text}], "cache": cache}
        # Whoever calls with a function of the prompt alone has no temperature to speak of.
        return self.body({"temperature": 0.0, **body}, tenant=tenant, model=model)

    def body(
        self,
        body: Mapping[str, Any],
        *,
        tenant: str,
        model: str,
        temperature: float = 1.0,
        chat: bool | None = None,
    ) -> CacheRequest:
        """Of a body of `/v1/chat/completions` or `/v1/completions` that has been found good.

        Args:
          tenant: from the key that came with the request, never from the body.
          model: that answers, however the body calls it.
          temperature: of a body that names none.
          chat: which of the two it came to: what the other one reads may stand in it and means nothing. By default it
            is a chat if it has messages.

        Raises:
          UserError: its field `cache` is wrong.
        """
        mode, delta, ttl_s = read_directives(body.get("cache"))
        chat = "messages" in body if chat is None else chat
        system, history, text, bypass = _conversation(body, chat)
        if bypass is None:
            bypass = self._unfit(body, body.get("temperature"), temperature, opted="mode" in (body.get("cache") or {}))
        if mode == "off":
            bypass = "off"
        owner = self._config.owner(tenant)
        sampling = {
            name: value
            for name, value in body.items()
            if value is not None and name not in _NO_MATTER | _ELSEWHERE and _DEFAULTS.get(name, _MISSING) != value
        }
        fields = {
            "tenant": owner,
            "model": [model, self._config.revisions.get(model, self._config.revision)],
            "system": system,
            "history": history,
            "tools": [body.get("tools"), body.get("tool_choice")],
            "response_format": body.get("response_format"),
            "sampling": {"temperature": temperature, **sampling},
            "endpoint": "chat" if chat else "text",
        }
        try:
            exact = digest({**fields, "text": text})
        except RecursionError:  # in a field that nobody reads, as others would have been refused
            return CacheRequest(owner, model, "", b"", b"", mode, delta, ttl_s, bypass or "nested")
        if self._config.embed_history and history:
            fields.pop("history")
            turns = [f"{turn.get('role')}: {turn.get('content')}" for turn in history[-_LAST_TURNS:]]
            text = "\n".join([*turns, text])
        kept = {name: fields[name] for name in (*self._config.scope_fields, "endpoint") if name in fields}
        return CacheRequest(owner, model, text, digest(kept), exact, mode, delta, ttl_s, bypass)

    def _unfit(self, body: Mapping[str, Any], given: float | None, default: float, *, opted: bool) -> str | None:
        """Why an answer to this is not one that another request could be given."""
        if max(body.get("n") or 1, body.get("best_of") or 1) > 1:
            return "n"
        logprobs = body.get("logprobs")  # 0 asks for some, and equals False
        if (logprobs is not None and logprobs is not False) or body.get("prompt_logprobs") is not None:
            return "logprobs"
        if body.get("tools") and body.get("tool_choice") != "none":
            return "tools"
        for name in ("echo", "continue_final_message", "return_token_ids"):
            if body.get(name):
                return name
        if not opted and (default if given is None else given) > self._config.max_temperature:
            return "temperature"
        return None


_MISSING = object()


def read_directives(found: Any) -> tuple[Mode, float | None, float | None]:
    """The field `cache` of a request: mode, delta, ttl_s. Raises UserError."""
    if found is None:
        return "on", None, None
    known = ("mode", "delta", "ttl_s")
    if not isinstance(found, Mapping) or not set(found) <= set(known):
        raise UserError(f"cache: found {str(found)[:80]!r}, expected an object with {', '.join(known)}")
    mode, delta, ttl_s = found.get("mode", "on"), found.get("delta"), found.get("ttl_s")
    if mode not in MODES:
        raise UserError(f"cache.mode: found {str(mode)[:80]!r}, expected one of {', '.join(MODES)}")
    for name, value, most in (("delta", delta, 0.5), ("ttl_s", ttl_s, _LONGEST_TTL_S)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value <= most):
            raise UserError(f"cache.{name}: found {str(value)[:80]!r}, expected a number above 0 and at most {most:g}")
    return mode, delta, ttl_s


def digest(content: Any) -> bytes:
    """16 bytes of canonical JSON: keys in order."""
    text = json.dumps(_normal(content), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _normal(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {str(name): _normal(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_normal(value) for value in content]
    if isinstance(content, float) and content.is_integer():
        return int(content)  # 1.0 and 1 ask for the same
    return content


def _said(text: str) -> str:
    """What is said in a turn, in NFC and without the space behind it. Only there does that space mean nothing: a stop
    string may be nothing else, and the prompt of a completion is continued behind it.
    """
    return unicodedata.normalize("NFC", text).rstrip()


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": _said(content)} if isinstance(content, str) else dict(message)


def _conversation(body: Mapping[str, Any], chat: bool) -> tuple[list[Any], list[Any], str, str | None]:
    """System messages at the beginning, turns after them, the last turn's text, and why that is nothing to compare."""
    if not chat:
        prompt = body.get("prompt")
        return [], [], *((prompt, None) if isinstance(prompt, str) else ("", "prompt"))
    messages: Sequence[Mapping[str, Any]] = body["messages"]
    leading = next((i for i, m in enumerate(messages) if m.get("role") not in ("system", "developer")), len(messages))
    system, turns = list(map(_turn, messages[:leading])), list(map(_turn, messages[leading:]))
    if not turns or turns[-1].get("role") != "user":
        return system, turns, "", "last turn"
    last = turns.pop()
    content = last.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            return system, turns, "", "content"
        content = "\n".join(part["text"] for part in content)
    # Whatever else the last turn carries (a name) must match exactly.
    rest = {name: value for name, value in last.items() if name not in ("role", "content") and value is not None}
    turns = [*turns, rest] if rest else turns
    return system, turns, *((_said(content), None) if isinstance(content, str) else ("", "content"))
