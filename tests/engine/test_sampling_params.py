"""What sampling parameters and guides accept, refuse and keep."""

import dataclasses
import json

import pytest

from jaxstack.engine.request import MAX_CHOICES, MAX_GUIDE_BYTES, Guide, SamplingParams
from jaxstack.runtime.errors import UserError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"min_p": float("nan")}, "min_p"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"presence_penalty": float("nan")}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"logit_bias": {5: 100.5}}, r"logit_bias\[5\]"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5\]"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias: found -1"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "each token id once"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias: found 1025, expected at most 1024"),
        ({"allowed_token_ids": ()}, "allowed_token_ids"),
        ({"allowed_token_ids": (3, -2)}, "allowed_token_ids: found -2"),
        ({"stop_token_ids": (-1,)}, "stop_token_ids: found -1"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 17}, "min_tokens: found 17, expected an integer from 0 to max_tokens = 16"),
        ({"n": 3, "best_of": 2}, "best_of: found 2, expected an integer from n = 3"),
        ({"best_of": 129}, "best_of"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logprobs_mode": "cooked"}, "logprobs_mode: found 'cooked', expected raw or processed"),
        ({"guide": "regex"}, "guide"),
    ],
)
def test_a_value_out_of_range_is_named(change, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**change)


def test_the_edges_of_the_ranges_are_inside():
    SamplingParams(min_p=1.0, presence_penalty=-2.0, frequency_penalty=2.0, repetition_penalty=5.0, min_tokens=16)
    SamplingParams(logit_bias=dict.fromkeys(range(1024), -100.0), n=128, best_of=128, prompt_logprobs=20)
    assert SamplingParams(max_tokens=None, min_tokens=10_000).min_tokens == 10_000


def test_token_lists_are_kept_sorted_and_survive_replace():
    kept = SamplingParams(logit_bias={9: 1, 2: -3.5}, allowed_token_ids=(7, 3, 7))
    assert kept.biases == kept.logit_bias == ((2, -3.5), (9, 1.0))
    assert kept.allowed_token_ids == (3, 7)
    changed = dataclasses.replace(kept, n=2)
    assert changed.biases == kept.biases
    assert changed.choices == 2
    assert dataclasses.replace(changed, best_of=5).choices == 5
    hash(changed)
    assert SamplingParams(logit_bias={}).logit_bias is None


def test_token_ids_are_checked_against_the_vocabulary():
    SamplingParams(logit_bias={9: 1.0}, allowed_token_ids=(9,)).check_token_ids(10)
    with pytest.raises(UserError, match="logit_bias: found 9, expected token ids from 0 to 8"):
        SamplingParams(logit_bias={9: 1.0}).check_token_ids(9)
    with pytest.raises(UserError, match="allowed_token_ids: found 12"):
        SamplingParams(allowed_token_ids=(1, 12)).check_token_ids(9)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("xml", "a", "guide: found 'xml', expected one of json_schema"),
        ("regex", "", "regex: found an empty text"),
        ("regex", 5, "regex: found 5, expected a string"),
        ("regex", "\ud800", "surrogate"),
        ("lark", "a" * (MAX_GUIDE_BYTES + 1), f"lark: found {MAX_GUIDE_BYTES + 1} bytes"),
        ("json_object", "{}", "json_object: found '{}', expected no text"),
        ("json_schema", "{", "json_schema: found no valid JSON"),
        ("json_schema", "[" * 100_000, "json_schema: found no valid JSON"),
        ("json_schema", "[1]", r"json_schema: found \[1\], expected a JSON schema"),
        ("choice", "yes", "choice: found no valid JSON"),
        ("choice", "[]", "choice: found"),
        ("choice", '["a", 1]', "choice: found"),
        ("choice", '["a", ""]', "choice: found"),
        ("choice", json.dumps(["a"] * (MAX_CHOICES + 1)), f"choice: found {MAX_CHOICES + 1}"),
    ],
)
def test_a_wrong_guide_is_refused_with_its_kind(kind, text, message):
    with pytest.raises(UserError, match=message):
        Guide(kind, text)


def test_good_guides():
    for guide in (
        Guide("json_object"),
        Guide("json_schema", '{"type": "object"}'),
        Guide("json_schema", "true"),
        Guide("regex", "a+"),
        Guide("lark", 'start: "a"'),
        Guide("choice", '["yes", "no"]'),
    ):
        assert SamplingParams(guide=guide).guide == guide
