"""What a client says of tools: which are on offer, which must be called, and how the prompt tells the model.

A chat template that knows of tools is handed them. For one that does not, they are described in a system message, and
earlier calls and their results are written into the conversation as text, in Hermes's notation.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxstack.serving.errors import ApiError, bad_field

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_MAX_TOOLS = 128
_INSTRUCTIONS = """You can call these functions:
{tools}
To call one, write its name and arguments as JSON between tags, nothing else inside them:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
The result comes back between <tool_response> tags."""


@dataclasses.dataclass(frozen=True)
class Tools:
    """Functions that the model may call.

    Attributes:
      offered: the tools as they came, each `{"type": "function", "function": {...}}`.
      required: whether an answer must be a call.
      named: the one function that must be called; None for any.
      parallel: whether an answer may hold several calls.
    """

    offered: tuple[dict[str, Any], ...]
    required: bool = False
    named: str | None = None
    parallel: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.offered)

    @property
    def callable(self) -> list[dict[str, Any]]:
        """The functions that a forced call may be of."""
        functions = [tool["function"] for tool in self.offered]
        return [f for f in functions if self.named in (None, f["name"])]


def read_tools(tools: Any, choice: Any, parallel: bool | None) -> Tools | None:
    """The fields `tools`, `tool_choice` and `parallel_tool_calls`; None if nothing may be called.

    Raises:
      ApiError: 400, naming the field.
    """
    if tools is not None and not isinstance(tools, list):
        raise bad_field("tools", tools, "a list of tools")
    tools = tools or []
    if len(tools) > _MAX_TOOLS:
        raise ApiError(400, f"tools: found {len(tools)}, expected at most {_MAX_TOOLS}", param="tools")
    offered = tuple(_read_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in offered]
    for name in names:
        if names.count(name) > 1:
            raise ApiError(400, f"tools: found the name {name!r} twice, expected each once", param="tools")
    named = None
    if isinstance(choice, dict):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, dict) else None
        if choice.get("type") != "function" or not isinstance(named, str):
            raise bad_field("tool_choice", choice, 'none, auto, required or {"type": "function", "function": {"name"}}')
        if named not in names:
            raise bad_field("tool_choice", named, f"one of the tools: {', '.join(names) or 'none was given'}")
    elif choice not in (None, "none", "auto", "required"):
        raise bad_field("tool_choice", choice, 'none, auto, required or {"type": "function", "function": {"name"}}')
    if choice == "required" and not offered:
        raise ApiError(400, "tool_choice: required, but no tools were given", param="tool_choice")
    if not offered or choice == "none":
        return None
    return Tools(offered, choice == "required" or named is not None, named, parallel is not False)


def _read_tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise bad_field(where, tool, '{"type": "function", "function": {...}}')
    function = tool["function"]
    name, description, parameters = (function.get(key) for key in ("name", "description", "parameters"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise bad_field(f"{where}.function.name", name, "up to 128 letters, digits, dots, underscores and dashes")
    if description is not None and not isinstance(description, str):
        raise bad_field(f"{where}.function.description", description, "a string")
    if parameters is not None and not isinstance(parameters, dict):
        raise bad_field(f"{where}.function.parameters", parameters, "a JSON schema, which is an object")
    return tool


def messages_as_text(messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> list[dict[str, Any]]:
    """The conversation for a template that knows nothing of tools."""
    talk = [_as_text(message) for message in messages]
    if tools is not None:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.offered)
        instructions = _INSTRUCTIONS.format(tools=listed)
        if talk[0]["role"] == "system":
            talk[0] = {**talk[0], "content": f"{talk[0]['content']}\n\n{instructions}"}
        else:
            talk.insert(0, {"role": "system", "content": instructions})
    return talk


def _as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    parts = [message["content"]] if message["content"] else []
    for call in calls:
        function = {"name": call["function"]["name"], "arguments": call["function"].get("arguments")}
        parts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
    return {"role": message["role"], "content": "\n".join(parts)}
