"""Answers of a given form: what clients ask for, in OpenAI's and in vLLM's words, as the engine's `Guide`."""

import json
from collections.abc import Mapping
from typing import Any

from jaxstack.engine import Guide
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.serving.errors import ApiError, bad_field
from jaxstack.serving.reasoning import BEGIN, END
from jaxstack.serving.tool_choice import Tools
from jaxstack.serving.tools import MARKERS, ToolFormat

# vLLM's older fields, and the entry of `structured_outputs` that each has become.
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
# Entries of `structured_outputs` that are left alone if they ask for nothing.
_OPTIONS = ("disable_fallback", "disable_any_whitespace", "disable_additional_properties", "whitespace_pattern")


def read_guide(fields: Mapping[str, Any]) -> Guide | None:
    """The guide that `response_format`, `structured_outputs` or one of vLLM's older fields asks for.

    Args:
      fields: these fields of the request; None where they are absent.

    Raises:
      ApiError: 400, naming the field: malformed, or two of them at once.
      UserError: a schema or grammar that is none.
    """
    asked: list[tuple[str, Guide]] = []
    if fields.get("response_format") is not None:
        guide = _of_response_format(fields["response_format"])
        asked += [] if guide is None else [("response_format", guide)]
    if fields.get("structured_outputs") is not None:
        asked.append(("structured_outputs", _of_structured_outputs(fields["structured_outputs"])))
    for name, kind in GUIDED.items():
        if fields.get(name) is not None:
            asked.append((name, _guide(name, kind, fields[name])))
    if len(asked) > 1:
        (first, _), (second, _) = asked[:2]
        raise ApiError(400, f"{second}: found together with {first}, expected one of them", param=second)
    return asked[0][1] if asked else None


def _of_response_format(found: Any) -> Guide | None:
    where = "response_format"
    kind = found.get("type") if isinstance(found, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Guide("json_object")
    if kind != "json_schema":
        raise bad_field(where, found, "an object whose type is text, json_object or json_schema")
    inner = found.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise bad_field(f"{where}.json_schema.schema", schema, "a JSON schema, which is an object")
    return Guide("json_schema", json.dumps(schema))


def _of_structured_outputs(found: Any) -> Guide:
    where = "structured_outputs"
    if not isinstance(found, dict):
        raise bad_field(where, found, "an object")
    given = {name: value for name, value in found.items() if value is not None and name not in _OPTIONS}
    for name in _OPTIONS:
        if found.get(name):
            raise ApiError(400, f"{where}.{name}: not supported by this server", param=where)
    if len(given) != 1:
        raise bad_field(where, sorted(given), "one of json, json_object, regex, choice and grammar")
    ((kind, value),) = given.items()
    if kind == "json_object":
        if value is not True:
            raise bad_field(f"{where}.json_object", value, "true")
        return Guide("json_object")
    if kind not in GUIDED.values():
        raise bad_field(where, kind, "one of json, json_object, regex, choice and grammar")
    return _guide(f"{where}.{kind}", kind, value)


def _guide(where: str, kind: str, value: Any) -> Guide:
    if kind == "json":
        if not isinstance(value, (str, dict)):
            raise bad_field(where, value, "a JSON schema, as an object or as text")
        return Guide("json_schema", value if isinstance(value, str) else json.dumps(value))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
            raise bad_field(where, value, "a list of strings, none empty")
        return Guide("choice", json.dumps(value))
    if not isinstance(value, str) or not value:
        raise bad_field(where, value, "a string that is not empty")
    return Guide("regex" if kind == "regex" else "lark", value)


def tool_guide(tools: Tools, notation: ToolFormat, tokenizer: Tokenizer) -> Guide:
    """The guide of an answer that must be a call, or several if that is allowed: markers, names and arguments."""
    key = "parameters" if notation == "llama3" else "arguments"
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, key: _arguments(function)},
            "required": ["name", key],
            "additionalProperties": False,
        }
        for function in tools.callable
    ]
    call = {"anyOf": calls}
    if notation == "hermes":
        begin, end = _literal(MARKERS["hermes"], tokenizer), _literal("</tool_call>", tokenizer)
        more = r' ("\n" call)*' if tools.parallel else ""
        return Guide("lark", f'start: call{more}\ncall: {begin} "\\n" json "\\n" {end}\njson: %json {json.dumps(call)}')
    if notation == "llama3":
        return Guide("json_schema", json.dumps(call))
    begin = _literal(MARKERS["mistral"], tokenizer)
    if "[ARGS]" in tokenizer.chat_template(tools=True).source:
        args = _literal("[ARGS]", tokenizer)
        rules = [f"call{i}: {_text(f['name'])} {args} json{i}" for i, f in enumerate(tools.callable)]
        rules += [f"json{i}: %json {json.dumps(_arguments(f))}" for i, f in enumerate(tools.callable)]
        choice = " | ".join(f"call{i}" for i in range(len(tools.callable)))
        more = "+" if tools.parallel else ""
        return Guide("lark", "\n".join([f"start: one{more}", f"one: {begin} ({choice})", *rules]))
    listed: dict[str, Any] = {"type": "array", "items": call, "minItems": 1}
    if not tools.parallel:
        listed["maxItems"] = 1
    return Guide("lark", f"start: {begin} json\njson: %json {json.dumps(listed)}")


def _arguments(function: Mapping[str, Any]) -> dict[str, Any]:
    # No parameters at all means a function that takes none.
    return function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}


def after_thinking(guide: Guide, *, begun: bool, tokenizer: Tokenizer, ours: bool = False) -> Guide:
    """`guide` for a model that may think first, or, if the prompt has begun that, goes on thinking.

    A grammar of the client's own is left as it is, and holds from the first token on; `ours` says that it is one from
    `tool_guide`, whose rule `start` comes first.
    """
    if guide.kind == "lark" and not ours:
        return guide
    if guide.kind == "lark":
        body = guide.text.removeprefix("start: ")
    elif guide.kind == "regex":
        body = "/" + guide.text.replace("/", r"\/").replace("\n", r"\n") + "/"
    elif guide.kind == "choice":
        body = " | ".join(_text(text) for text in json.loads(guide.text))
    else:
        schema = {"type": "object"} if guide.kind == "json_object" else json.loads(guide.text)
        body = f"%json {json.dumps({} if schema is True else schema)}"
    if _special(END, tokenizer):
        thinking = f"thinking: /(?s:.*)/ {_literal(END, tokenizer)}"
    else:
        thinking = f"thinking[suffix={_text(END)}]: /(?s:.*)/"
    blanks = r"/[ \n]*/"
    first = f"thinking {blanks}" if begun else f"({_literal(BEGIN, tokenizer)} thinking {blanks})?"
    return Guide("lark", f"start: {first} answer\n{thinking}\nanswer: {body}")


def _special(token: str, tokenizer: Tokenizer) -> int | None:
    found = tokenizer.token_to_id(token)
    return found if found in tokenizer.special_ids else None


def _literal(token: str, tokenizer: Tokenizer) -> str:
    """A marker in Lark's notation: special tokens by number, for they have no text there."""
    special = _special(token, tokenizer)
    return _text(token) if special is None else f"<[{special}]>"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
