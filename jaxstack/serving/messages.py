"""Conversations as clients send them, made what chat templates take."""

import json
import logging
from typing import Any

from jaxstack.serving.errors import ApiError, bad_field, shorten

log = logging.getLogger(__name__)

_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """A conversation as chat templates take it: `content` a string, `developer` called `system`.

    Raises:
      ApiError: 400, naming the message and the field.
    """
    if not isinstance(messages, list) or not messages:
        raise bad_field("messages", messages, "a list of messages, at least one")
    return [_read_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise bad_field(where, message, "an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise bad_field(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_read_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and role == "assistant" and calls):
        raise bad_field(f"{where}.content", content, "a string or a list of text parts")
    clean = {**message, "role": "system" if role == "developer" else role, "content": content or ""}
    if calls:
        clean["tool_calls"] = _read_calls(calls, f"{where}.tool_calls")
    return clean


def _read_part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(part, dict) and isinstance(part.get("type"), str) and part["type"] != "text":
        found = f"a part of type {shorten(part['type'])}"
        raise ApiError(400, f"{where}: found {found}, expected text parts; this model reads text only", param=where)
    raise bad_field(where, part, 'a text part {"type": "text", "text": ...}')


def _read_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Earlier tool calls, their arguments decoded: templates print them as JSON themselves."""
    if not isinstance(calls, list) or not all(
        isinstance(c, dict) and isinstance(c.get("function"), dict) and isinstance(c["function"].get("name"), str)
        for c in calls
    ):
        raise bad_field(where, calls, "a list of objects with function.name")
    decoded = []
    for call in calls:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                log.debug("%s: arguments that are not JSON are handed on as text", where)
        decoded.append({**call, "function": {**call["function"], "arguments": arguments}})
    return decoded
