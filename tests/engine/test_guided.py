"""Grammars with the tokenizers that there are: masks, matchers, what does not compile."""

import json
import random
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxstack.engine.detokenise import IncrementalDetokenizer
from jaxstack.engine.guided import GrammarCompiler, MaskFiller
from jaxstack.engine.logit_rules import words
from jaxstack.engine.request import Guide
from jaxstack.models.embedded import embedded_model
from jaxstack.models.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer
from jaxstack.runtime.errors import UserError


def sentencepiece_like() -> Tokenizer:
    """Blanks as a mark at the front of words, bytes for what is no token, the first blank dropped in decoding."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    texts += ["▁", "yes", "▁yes", "no", "▁no", "▁[", "[", "]", '"', ",", "1", "2", "▁1", "▁2", '▁"', '{"', "a", "▁a"]
    model = tokenizers.models.BPE({t: i for i, t in enumerate(texts)}, [], byte_fallback=True, unk_token="<unk>")
    pipeline = tokenizers.Tokenizer(model)
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    d = tokenizers.decoders
    pipeline.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(pipeline, special_tokens={"eos_token": "</s>"})


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "sentencepiece": sentencepiece_like,
    "words": lambda: load_tokenizer(embedded_model("countdown")),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def case(request):
    """(tokenizer, vocab of the model, compiler); the model's table is padded."""
    tokenizer = TOKENIZERS[request.param]()
    vocab = tokenizer.vocab_size + 13
    return tokenizer, vocab, GrammarCompiler(tokenizer, tokenizer.eos_token_ids, vocab)


def allowed(matcher, vocab):
    masks = np.zeros((2, words(vocab)), np.int32)
    MaskFiller().fill(masks, [(matcher, 1)])
    assert not masks[0].any()
    return np.flatnonzero(np.unpackbits(masks[1].astype("<i4").view(np.uint8), bitorder="little")[:vocab]).tolist()


def random_answer(case, guide, rng, longest=400):
    """The text of tokens drawn at random among those allowed, and whether it came to an end."""
    tokenizer, vocab, compiler = case
    matcher = compiler.compile(guide).matcher()
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = ""
    for _ in range(longest):
        choices = allowed(matcher, vocab)
        assert choices
        ends = [t for t in choices if t in tokenizer.eos_token_ids]
        assert bool(ends) == matcher.accepting
        token = rng.choice(choices)
        assert matcher.valid_prefix([token]) == 1
        assert matcher.consume(token)
        if token in tokenizer.eos_token_ids:
            return text + detokenizer.finish(), True
        text += detokenizer.push([token])
        if matcher.finished:
            return text + detokenizer.finish(), True
    return text, False


def test_any_way_through_a_regex_is_a_match(case):
    rng = random.Random(0)
    patterns = [r"yes( no| yes){2,4}", r"(\( )?[0-9]( \+ [0-9]{1,2}){1,3}", r"no|yes yes"]
    for pattern in patterns:
        for _ in range(10):
            text, ended = random_answer(case, Guide("regex", pattern), rng)
            assert ended
            assert re.fullmatch(pattern, text), (pattern, text)


def test_one_of_the_choices_comes_out(case):
    rng = random.Random(1)
    choices = ["yes", "no", "yes no", "1 2"]
    found = set()
    for _ in range(40):
        text, ended = random_answer(case, Guide("choice", json.dumps(choices)), rng)
        assert ended
        found.add(text)
    assert found == set(choices)


def test_a_lark_grammar_is_followed(case):
    grammar = 'start: item (" + " item)*\nitem: "1" | "( " start " )"'
    rng = random.Random(2)
    for _ in range(10):
        text, ended = random_answer(case, Guide("lark", grammar), rng, longest=60)
        if ended:
            assert eval(text) >= 1  # nothing but ones, sums and parentheses
        else:
            assert set(text) <= set("1 +()")


def test_what_the_tokens_cannot_write_is_refused(case):
    tokenizer, _, compiler = case
    guide = Guide("json_object")
    if tokenizer.joins_bytes or tokenizer.is_raw_byte(5):
        compiler.compile(guide)
    else:
        with pytest.raises(UserError, match="json_object: no token of this model can begin"):
            compiler.compile(guide)


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_answers_to_a_schema_are_instances_of_it(name):
    tokenizer = TOKENIZERS[name]()
    case = tokenizer, tokenizer.vocab_size, GrammarCompiler(tokenizer, tokenizer.eos_token_ids, tokenizer.vocab_size)
    rng = random.Random(3)
    ends = 0
    for _ in range(12):
        text, ended = random_answer(case, Guide("json_schema", json.dumps(SCHEMA)), rng, longest=150)
        ends += ended
        if ended:
            value = json.loads(text)
            assert value["kind"] in ("a", "b")
            assert 0 <= value["count"] <= 99
            assert all(isinstance(tag, bool) for tag in value.get("tags", []))
            assert set(value) <= set(SCHEMA["properties"])
    assert ends


BYTES = GrammarCompiler(byte_tokenizer(), byte_tokenizer().eos_token_ids, byte_tokenizer().vocab_size)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=1, max_size=4))
@example(["\x7f", "/", "\\", "😀"])
@settings(max_examples=60, deadline=None)
def test_a_choice_may_hold_any_character(choices):
    matcher = BYTES.compile(Guide("choice", json.dumps(choices))).matcher()
    first, *rest = choices[0].encode()
    assert matcher.consume(first)
    assert matcher.valid_prefix(rest) == len(rest)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(a", "regex: .*unclosed group"),
        ("regex", "(?=a)b", "regex: .*look-around"),
        ("lark", "start: foo", 'lark: .*unknown name: "foo"'),
        ("lark", 'begin: "a"', "lark: no start rule"),
        ("lark", '{"grammars": []}', "lark: found a text that begins with"),
        ("json_schema", '{"type": "strin"}', "json_schema: Invalid type: strin"),
        ("json_schema", '{"$ref": "http://elsewhere/schema"}', "json_schema: .*not fetch"),
        ("json_schema", '{"type": "object", "not": {}}', 'json_schema: Unimplemented keys: ."not"'),
        ("json_schema", '{"allOf": [{"type": "string"}, {"type": "number"}]}', "json_schema: Unsatisfiable"),
        ("json_schema", "[" * 0 + '{"a":' * 400 + "1" + "}" * 400, "json_schema: recursion limit"),
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(kind, text, message):
    guide = Guide(kind, text)
    for _ in range(2):  # the second time from memory
        with pytest.raises(UserError, match=message) as caught:
            BYTES.compile(guide)
        assert "\n" not in str(caught.value)


def test_a_grammar_is_compiled_once_and_its_matchers_are_apart():
    grammar = BYTES.compile(Guide("regex", "ab|cd"))
    assert BYTES.compile(Guide("regex", "ab|cd")) is grammar
    first, second = grammar.matcher(), grammar.matcher()
    assert first.consume(ord("a"))
    assert allowed(first, 261) == [ord("b")]
    assert allowed(second, 261) == [ord("a"), ord("c")]
    assert second.valid_prefix([ord("c"), ord("d"), ord("d")]) == 2
    assert not second.consume(ord("x"))


def test_the_cache_is_bounded():
    compiler = GrammarCompiler(byte_tokenizer(), (258,), 261, capacity=2)
    for text in ("a", "b", "c"):
        compiler.compile(Guide("regex", text))
    assert list(compiler._known) == [Guide("regex", "b"), Guide("regex", "c")]


def test_no_tokenizer_no_end_token_no_grammar():
    with pytest.raises(UserError, match="no tokenizer"):
        GrammarCompiler(None, (1,), 10).compile(Guide("json_object"))
    with pytest.raises(UserError, match="no end token"):
        GrammarCompiler(byte_tokenizer(), (), 261).compile(Guide("json_object"))
