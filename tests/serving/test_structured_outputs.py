"""Answers of a given form, asked for by the real client: schemas, choices, expressions, and calls that are required."""

import json
import re
from typing import Any, Literal

import openai
import pydantic
import pytest

from jaxstack.models.embedded import embedded_model
from jaxstack.models.tokenizer import byte_tokenizer, load_tokenizer
from jaxstack.serving.guides import after_thinking, read_guide

TALK: list[Any] = [{"role": "user", "content": "hello"}]
ASKED: dict[str, Any] = {"model": "tiny", "messages": TALK, "max_tokens": 200, "seed": 1}


class Verdict(pydantic.BaseModel):
    colour: Literal["red", "green"]
    sure: bool


def tool(name: str, **properties: Any) -> Any:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"does {name}", "parameters": schema}}


TOOLS = [tool("look", what={"enum": ["sky", "sea"]}), tool("wait", long={"type": "boolean"})]


def test_a_schema_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(response_format=Verdict, **ASKED)
    assert isinstance(answer.choices[0].message.parsed, Verdict) and answer.choices[0].finish_reason == "stop"
    several = client.chat.completions.parse(response_format=Verdict, n=3, **ASKED)
    assert all(isinstance(choice.message.parsed, Verdict) for choice in several.choices)


def test_vllm_s_words(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for extra, pattern in (
        ({"guided_choice": ["yes", "no"]}, r"yes|no"),
        ({"guided_regex": "[ab]{3}/c"}, r"[ab]{3}/c"),
        ({"guided_grammar": 'start: "x" ("y" | "z")'}, r"x[yz]"),
        ({"guided_json": schema}, r'\{\s*"a"\s*:\s*(true|false)\s*\}'),
        ({"structured_outputs": {"choice": ["é", "\n"]}}, r"é|\n"),
        ({"structured_outputs": {"regex": "q+"}, "max_tokens": 5}, r"q+"),
    ):
        answer = client.completions.create(
            model="tiny", prompt="x", max_tokens=extra.pop("max_tokens", 200), extra_body=extra
        )
        assert re.fullmatch(pattern, answer.choices[0].text), (extra, answer.choices[0].text)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", extra_body={"guided_regex": "(["})


def test_a_call_that_is_required(client: openai.OpenAI) -> None:
    asked = {**ASKED, "tools": TOOLS, "parallel_tool_calls": False}
    for choice, names in (
        ("required", {"look", "wait"}),
        ({"type": "function", "function": {"name": "wait"}}, {"wait"}),
    ):
        answer = client.chat.completions.create(tool_choice=choice, **asked).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name in names and call.id.startswith("call_") and call.type == "function"
        arguments = json.loads(call.function.arguments)
        assert arguments in ({"what": "sky"}, {"what": "sea"}, {"long": True}, {"long": False})
        chunks = list(client.chat.completions.create(tool_choice=choice, stream=True, **asked))
        deltas = [c.delta.tool_calls[0] for chunk in chunks for c in chunk.choices if c.delta.tool_calls]
        assert deltas[0].function.name == call.function.name and len({d.id for d in deltas if d.id}) == 1
        assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments
        assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["tool_calls"]


def test_biases_penalties_and_limits(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "x", "max_tokens": 8, "seed": 5}
    biased = client.completions.create(logit_bias={"97": 100}, temperature=0, extra_body={"ignore_eos": True}, **asked)
    assert biased.choices[0].text == "a" * 8
    only = client.completions.create(extra_body={"allowed_token_ids": [98, 99], "ignore_eos": True}, **asked)
    assert set(only.choices[0].text) <= {"b", "c"}
    two = {"allowed_token_ids": [98, 99], "ignore_eos": True}
    fair = client.completions.create(temperature=0, presence_penalty=2, frequency_penalty=2, extra_body=two, **asked)
    assert set(fair.choices[0].text) == {"b", "c"}
    one = client.completions.create(extra_body={"min_p": 1.0, "ignore_eos": True}, **asked)
    greedy = client.completions.create(temperature=0, extra_body={"ignore_eos": True}, **asked)
    assert one.choices[0].text == greedy.choices[0].text
    ends = {"logit_bias": {"260": 100}, "extra_body": {"min_tokens": 5}}
    assert client.completions.create(**asked, **ends).usage.completion_tokens == 6


def test_thinking_comes_before_the_form() -> None:
    llguidance = pytest.importorskip("llguidance")
    for tokenizer in (byte_tokenizer(), load_tokenizer(embedded_model())):
        for asked in (
            {"guided_choice": ["yes", "no"]},
            {"guided_regex": "yes/?"},
            {"guided_json": {"enum": ["yes"]}},
            {"response_format": {"type": "json_object"}},
        ):
            guide = read_guide(asked)
            assert guide is not None
            for begun in (False, True):
                made = after_thinking(guide, begun=begun, tokenizer=tokenizer)
                text = llguidance.LLMatcher.grammar_from_lark(made.text)
                assert not llguidance.LLMatcher.validate_grammar(text, llguidance.LLTokenizer(BYTES, eos_token=260))


BYTES = byte_tokenizer().pipeline.to_str()
