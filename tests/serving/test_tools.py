"""Calls of tools are read out of a text alike, however it arrives; what is no call stays content."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxstack.serving.tools import CallPiece, ToolFormat, ToolReader

Calls = list[tuple[str, str]]


def read(
    notation: ToolFormat, pieces: list[str], names: tuple[str, ...] = ("f", "g"), parallel: bool = True
) -> tuple[str, Calls]:
    """Content, and name and arguments of each call."""
    reader = ToolReader(notation, names, parallel=parallel)
    content, calls, ids = "", [], []
    for event in [event for text in pieces for event in reader.push(text)] + reader.finish():
        if isinstance(event, str):
            assert event
            content += event
            continue
        assert isinstance(event, CallPiece)
        if event.id is not None:
            assert event.index == len(calls) and event.name is not None
            calls.append((event.name, ""))
            ids.append(event.id)
        assert event.index == len(calls) - 1
        calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
    assert len(set(ids)) == len(ids)
    return content, calls


TRICKY = '{"a": "}{[\\"<tool_call>\\\\", "b": [1, {"c": null}]}'
HERMES = f'<tool_call>\n{{"name": "f", "arguments": {TRICKY}}}\n</tool_call>'

CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    ("hermes", "plain text\n", "plain text\n", []),
    ("hermes", HERMES, "", [("f", TRICKY)]),
    ("hermes", f"I look.\n\n{HERMES}\n", "I look.", [("f", TRICKY)]),
    ("hermes", f"{HERMES}\n{HERMES}", "", [("f", TRICKY)] * 2),
    ("hermes", f"{HERMES} and then", " and then", [("f", TRICKY)]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"id": 7, "name": "f", "arguments": {}}</tool_call>', "", [("f", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut', "", [("f", '{"a": "cut')]),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}', "", [("unknown", "{}")]),
    ("hermes", '<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
    ("hermes", "<tool_call>f(1)</tool_call> so", "<tool_call>f(1)</tool_call> so", []),
    ("hermes", '<tool_call>{"name": 5} x', '<tool_call>{"name": 5} x', []),
    ("hermes", '<tool_call>{"a": 1,} x', '<tool_call>{"a": 1,} x', []),
    ("hermes", '<tool_call>{"a": tru]', '<tool_call>{"a": tru]', []),
    ("hermes", "a <tool <tool_cal", "a <tool <tool_cal", []),
    ("hermes", "<<tool_call>" + HERMES[11:], "<", [("f", TRICKY)]),
    ("llama3", "just text {", "just text {", []),
    ("llama3", f'{{"name": "f", "parameters": {TRICKY}}}', "", [("f", TRICKY)]),
    ("llama3", f' \n<|python_tag|>{{"name": "f", "parameters": {TRICKY}}}', "", [("f", TRICKY)]),
    (
        "llama3",
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"x": 1}}',
        "",
        [("f", "{}"), ("g", '{"x": 1}')],
    ),
    ("llama3", '{"type": "function", "name": "f", "parameters": {}}', "", [("f", "{}")]),
    ("llama3", '{"name": "other", "parameters": {}} x', '{"name": "other", "parameters": {}} x', []),
    ("llama3", '{"answer": 42} and', '{"answer": 42} and', []),
    ("llama3", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama3", "<|pyt", "<|pyt", []),
    ("llama3", '{"name": "f", "parameters": {}} done', " done", [("f", "{}")]),
    ("mistral", "text [TOOL] [", "text [TOOL] [", []),
    ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {TRICKY}}}]', "", [("f", TRICKY)]),
    (
        "mistral",
        'Well. [TOOL_CALLS][{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1}}]',
        "Well.",
        [("f", "{}"), ("g", '{"x": 1}')],
    ),
    ("mistral", f"[TOOL_CALLS]f[ARGS]{TRICKY}[TOOL_CALLS]g[ARGS]{{}}", "", [("f", TRICKY), ("g", "{}")]),
    ("mistral", "[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}", "", [("f", "{}")]),
    ("mistral", "[TOOL_CALLS]f{}", "", [("f", "{}")]),
    ("mistral", "[TOOL_CALLS]not a name{}", "[TOOL_CALLS]not a name{}", []),
    ("mistral", "[TOOL_CALLS][5]", "[TOOL_CALLS][5]", []),
]  # fmt: skip


@pytest.mark.parametrize(("notation", "text", "content", "calls"), CASES)
def test_reading(notation: ToolFormat, text: str, content: str, calls: Calls) -> None:
    assert read(notation, [text]) == (content, calls)
    assert read(notation, list(text)) == (content, calls)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(['"', "\\", "}", "</tool_call>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=4), JSON, max_size=3)


def written(notation: ToolFormat, calls: list[tuple[str, Any]]) -> str:
    if notation == "hermes":
        objects = [json.dumps({"name": n, "arguments": a}, ensure_ascii=False) for n, a in calls]
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in objects)
    if notation == "llama3":
        return "; ".join(json.dumps({"name": n, "parameters": a}, indent=1) for n, a in calls)
    return "[TOOL_CALLS] " + json.dumps([{"name": n, "arguments": a} for n, a in calls])


@given(
    st.sampled_from(["hermes", "llama3", "mistral"]),
    st.lists(st.tuples(st.sampled_from(["f", "g"]), ARGUMENTS), min_size=1, max_size=3),
    st.data(),
)
def test_what_was_written_is_read(notation: ToolFormat, calls: list[tuple[str, Any]], data: st.DataObject) -> None:
    text = written(notation, calls)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=5)))
    content, found = read(notation, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])])
    assert content == "" and [(name, json.loads(arguments)) for name, arguments in found] == calls
    first = read(notation, [text], parallel=False)
    assert first == ("", found[:1])


SYNTAX = '<tool_call> </tool_call> [TOOL_CALLS] [ARGS] [ ] <|python_tag|> { } "name" : "f" , ; < <tool'
OTHERS = '{"name":"f","arguments":{}} "parameters" "arguments" {} x " \\ 7'
PARTS = st.sampled_from([*SYNTAX.split(), *OTHERS.split(), " ", "\n"])


@given(st.sampled_from(["hermes", "llama3", "mistral"]), st.lists(PARTS, max_size=12), st.data())
@example("hermes", ["<tool_call>", "{", '"name"', ":", "7", "x", "}"], None)
def test_any_cut_gives_the_same(notation: ToolFormat, parts: list[str], data: Any) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8))) if data else []
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    whole = read(notation, [text])
    assert read(notation, pieces) == whole == read(notation, list(text))
    if not whole[1]:
        assert whole[0] == text
