"""The embedded model as shipped: its bytes, its form, and that it reasons, by a loop without cache or engine."""

import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxstack.models.attention import dense_attention
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.embedded import embedded_model
from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning.countdown import grade, held_out
from jaxstack.reasoning.tokenizer import VOCABULARY
from jaxstack.runtime.errors import UserError

FOLDER = embedded_model()
RECORD = json.loads((FOLDER / "training.json").read_text())


def test_bytes_are_those_of_the_record():
    names = {file.name for file in FOLDER.iterdir()}
    assert names == {*RECORD["sha256"], "training.json", "MODEL.md"}
    for name, digest in RECORD["sha256"].items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest, name
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2_000_000


def test_the_recorded_figures():
    measured = RECORD["measured"]
    assert measured["accuracy"] >= 0.70
    assert measured["accuracy_no_thinking"] < measured["accuracy"]


def test_tokenizer_is_the_one_the_code_builds():
    tokenizer = load_tokenizer(FOLDER)
    assert tuple(tokenizer.id_to_token(i) for i in range(tokenizer.vocab_size)) == VOCABULARY
    assert [VOCABULARY[i] for i in tokenizer.eos_token_ids] == ["<eos>"]


def test_unknown_name():
    with pytest.raises(UserError, match="embedded model 'chess' is unknown; embedded are countdown"):
        embedded_model("chess")


def greedy_texts(problems, *, thinking, length=144):
    """Greedy answers to all problems side by side, each step a whole forward pass: slow, and nothing to go wrong."""
    model, tokenizer = load_decoder(FOLDER, progress=False), load_tokenizer(FOLDER)
    rendered = [
        tokenizer.encode(
            tokenizer.render_chat([{"role": "user", "content": problem.content}], enable_thinking=thinking),
            add_special_tokens=False,
        )
        for problem in problems
    ]
    (prompt_length,) = {len(ids) for ids in rendered}
    tokens = np.zeros((len(problems), length), np.int32)
    tokens[:, :prompt_length] = rendered
    attend = dense_attention()

    @jax.jit
    def next_tokens(tokens, last):
        hidden, _ = model.hidden(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), attend)
        return jnp.argmax(model.logits(jax.lax.dynamic_index_in_dim(hidden, last, axis=1, keepdims=False)), axis=-1)

    eos = tokenizer.eos_token_ids[0]
    for last in range(prompt_length - 1, length - 1):
        so_far = -(-(last + 1) // 36) * 36  # what comes later is not looked at: four programs, and half of the work
        tokens[:, last + 1] = next_tokens(tokens[:, :so_far], last)
        if (tokens[:, prompt_length:] == eos).any(axis=1).all():
            break
    answers = [row[prompt_length:].tolist() for row in tokens]
    return [tokenizer.decode(ids[: ids.index(eos)] if eos in ids else ids) for ids in answers]


def test_it_solves_held_out_problems():
    problems = held_out(12)
    thinking = [grade(p, text).correct for p, text in zip(problems, greedy_texts(problems, thinking=True))]
    assert np.mean(thinking) >= 0.6
    direct = [grade(p, text).correct for p, text in zip(problems, greedy_texts(problems, thinking=False, length=24))]
    assert np.mean(direct) < np.mean(thinking)
