"""The word-level tokenizer: one id a word, exact round trips, and a chat template for thinking and not thinking."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxstack.reasoning import tokenizer as words
from jaxstack.reasoning import traces
from jaxstack.reasoning.countdown import prompts

TOKENIZER = words.build_tokenizer()
ids = st.lists(st.integers(0, len(words.VOCABULARY) - 1))


def test_vocabulary():
    assert len(words.VOCABULARY) == len(set(words.VOCABULARY)) == TOKENIZER.get_vocab_size() == 131
    assert words.VOCABULARY[:4] == ("<pad>", "<bos>", "<eos>", "<unk>")


@given(ids)
def test_encode_inverts_decode(sequence):
    assert TOKENIZER.encode(TOKENIZER.decode(sequence, skip_special_tokens=False)).ids == sequence


def test_blank_line_is_one_token():
    assert TOKENIZER.encode("no \n\n Hmm , try").tokens == ["no", "\n\n", "Hmm", ",", "try"]


def test_traces_are_known_words_and_decode_to_themselves():
    rng = random.Random(0)
    for problem in rng.sample(prompts("train"), 300):
        for make in (traces.search_trace, traces.random_steps, traces.hit_step):
            text = f"<bos> {problem.content} <think> {make(problem, rng).response} <eos>"
            encoded = TOKENIZER.encode(text)
            assert words.UNKNOWN not in encoded.tokens
            assert TOKENIZER.decode(encoded.ids, skip_special_tokens=False) == text


def test_longest_search_is_132_tokens():
    rng = random.Random(0)
    lengths = [
        len(TOKENIZER.encode(f"<bos> {p.content} <think> {traces.search_trace(p, rng).response} <eos>").ids)
        for split in ("train", "held_out")
        for p in prompts(split)[::7]
    ]
    assert max(lengths) <= 132


def test_thinking_is_shown_when_special_tokens_are_skipped():
    encoded = TOKENIZER.encode("<bos> <think> </think> answer 7 <eos>").ids
    assert TOKENIZER.decode(encoded, skip_special_tokens=True) == "<think> </think> answer 7"


@pytest.fixture
def folder(tmp_path):
    words.write_tokenizer(tmp_path, max_length=512)
    return tmp_path


def test_folder(folder):
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).to_str() == TOKENIZER.to_str()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<eos>"
    assert settings["model_max_length"] == 512
    assert settings["clean_up_tokenization_spaces"] is False
