"""Data sets: every row becomes the tokens and targets that the prompt and the response say, by the trainer's reader."""

import json

import numpy as np
import pytest

from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning.countdown import problems
from jaxstack.reasoning.datasets import samples, training_row, write_dataset
from jaxstack.reasoning.tokenizer import build_tokenizer, write_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.training.data import DataConfig, tokenize_row


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, max_length=512)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", ["countdown_base", "countdown_sft"])
def test_rows_train_the_response_only(name, tokenizer):
    reference = build_tokenizer()
    forms = set()
    for sample in samples(name, size=300, seed=0):
        prompt = f"<bos> {sample.problem.content} <think>" + ("" if sample.thinking else " </think>")
        response = sample.response + (" <eos>" if sample.stops else "")
        expected = reference.encode(prompt).ids, reference.encode(response).ids
        row = training_row(sample)
        forms.add((sample.thinking, sample.stops, "messages" in row))
        example = tokenize_row(row, tokenizer, DataConfig())
        assert example.token_ids.tolist() == expected[0] + expected[1]
        assert example.loss_mask.tolist() == [False] * len(expected[0]) + [True] * len(expected[1])
    # An empty thought is never a target: `</think>` right after `<think>` would become the model's favourite opening.
    assert (False, True, True) in forms
    assert (True, True, True) in forms
    assert ((True, False, False) in forms) == (name == "countdown_base")


def test_files_are_reproducible_and_grow_by_appending(tmp_path):
    for file, size, seed in (("a", 40, 1), ("b", 40, 1), ("c", 60, 1), ("d", 40, 2)):
        write_dataset("countdown_sft", tmp_path / "folder" / file, size=size, seed=seed)
    a, b, c, d = ((tmp_path / "folder" / file).read_text() for file in "abcd")
    assert a == b
    assert c.startswith(a)
    assert c.count("\n") == 60
    assert a != d
    assert len(list((tmp_path / "folder").iterdir())) == 4
    assert all(json.loads(line)["messages"] for line in a.splitlines())


def test_no_held_out_problem_is_trained_on():
    held_out = {problem.identity for problem in problems("held_out")}
    for name in ("countdown_base", "countdown_sft"):
        assert not held_out & {sample.problem.identity for sample in samples(name, size=3000, seed=5)}


def test_generation_prompts(tokenizer):
    user = [{"role": "user", "content": " numbers 3 5 7 target 26\n"}]
    assert tokenizer.render_chat(user) == "<bos> numbers 3 5 7 target 26 <think>"
    assert tokenizer.render_chat(user, enable_thinking=False) == "<bos> numbers 3 5 7 target 26 <think> </think>"
    answered = [*user, {"role": "assistant", "content": "<think> </think> answer 7"}]
    whole = tokenizer.render_chat(answered, add_generation_prompt=False)
    assert whole == "<bos> numbers 3 5 7 target 26 <think> </think> answer 7 <eos>"
    ids = tokenizer.encode(whole, add_special_tokens=True)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=False) == whole
    assert np.count_nonzero(np.array(ids) == tokenizer.bos_token_id) == 1
    with pytest.raises(UserError, match="user and assistant messages only, found role system"):
        tokenizer.render_chat([{"role": "system", "content": "be brief"}, *user])


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("countdown", 10, "data set 'countdown' is unknown; known are countdown_base, countdown_sft"),
        ("countdown_sft", 0, "size is 0, expected at least 1"),
    ],
)
def test_bad_arguments(tmp_path, name, size, message):
    with pytest.raises(UserError, match=message):
        write_dataset(name, tmp_path / "x.jsonl", size=size, seed=0)
    assert not (tmp_path / "x.jsonl").exists()
