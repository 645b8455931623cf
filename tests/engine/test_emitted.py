"""Answers that go on where another engine was lost: with the tokens, and the text, that they would have had."""

import dataclasses
from collections.abc import Iterator

import pytest

from jaxstack.engine import Engine, EngineConfig, Guide, SamplingParams
from jaxstack.engine.request import Completion, Delta
from jaxstack.models.decoder import DecoderConfig
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.training.initialize import fresh_decoder

MODEL = DecoderConfig(
    architecture="Qwen2ForCausalLM", vocab_size=byte_tokenizer().vocab_size, hidden_size=16, intermediate_size=16,
    num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, qkv_bias=True, max_position_embeddings=128,
    initializer_range=0.4,
)  # fmt: skip
PROMPT = list(b"a prompt of more than a page")
LONG = SamplingParams(max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    config = EngineConfig(max_sequences=4, max_batch_tokens=16, page_size=8, num_pages=64, speculation=2)
    engine = Engine(fresh_decoder(MODEL), byte_tokenizer(), config)
    engine.warm_up(progress=False)
    yield engine
    engine.close()


def run(engine: Engine, sampling: SamplingParams, emitted: list[list[int] | None] | None = None) -> list[Completion]:
    """All choices; of one that goes on only what is new."""
    completions = [Completion(i) for i in range(sampling.n)]
    pieces: list[Delta] = []
    engine.submit(PROMPT, sampling, pieces.append, emitted=emitted)
    while engine.step():
        pass
    for piece in pieces:
        completions[piece.index].add(piece)
    engine.scheduler.check_accounting()
    assert not pieces or (pieces[-1].prompt_tokens == len(PROMPT) and pieces[-1].cached_tokens <= len(PROMPT))
    return completions


WAYS = {
    "greedy": dataclasses.replace(LONG, temperature=0.0),
    "seeded": LONG,
    "penalties": dataclasses.replace(LONG, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5),
    "min_tokens": dataclasses.replace(LONG, ignore_eos=False, min_tokens=18, logit_bias={257: 5.0, 258: 5.0}),
    "guided": dataclasses.replace(LONG, ignore_eos=False, guide=Guide("regex", "(é|漢|🙂){8}"), max_tokens=60),
    "logprobs": dataclasses.replace(LONG, logprobs=2, top_p=0.9, top_k=40),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_answer_goes_on_from_any_of_its_tokens(engine: Engine, way: str) -> None:
    sampling = WAYS[way]
    (whole,) = run(engine, sampling)
    count = len(whole.token_ids)
    assert count >= 16
    for kept in (0, 1, 7, count - 2, count - 1):
        (rest,) = run(engine, sampling, [whole.token_ids[:kept]])
        assert whole.token_ids[:kept] + rest.token_ids == whole.token_ids
        assert rest.finish_reason == whole.finish_reason
        assert whole.text.endswith(rest.text)  # what was certain before is not said again
        assert [e.token_id for e in rest.logprobs or []] == (whole.token_ids[kept:] if sampling.logprobs else [])


def test_a_stop_string_that_has_begun_is_found(engine: Engine) -> None:
    letters = tuple(b"abcdefgh")
    (whole,) = run(engine, dataclasses.replace(LONG, allowed_token_ids=letters))
    sampling = dataclasses.replace(LONG, allowed_token_ids=letters, stop=(whole.text[9:13],))
    (stopped,) = run(engine, sampling)
    at = whole.text.index(whole.text[9:13])
    assert stopped.text == whole.text[:at] and stopped.stop_reason == whole.text[9:13]
    for kept in range(at, at + 4):  # some of the stop string is in what was drawn elsewhere, and was held back there
        (rest,) = run(engine, sampling, [whole.token_ids[:kept]])
        assert rest.finish_reason == "stop" and rest.text == "" and rest.stop_reason == stopped.stop_reason


def test_choices_go_on_each_from_its_own_place(engine: Engine) -> None:
    sampling = dataclasses.replace(LONG, n=3)
    first, second, third = run(engine, sampling)
    assert first.token_ids != third.token_ids
    one, two, three = run(engine, sampling, [first.token_ids[:5], None, []])
    assert one.token_ids == first.token_ids[5:] and three.token_ids == third.token_ids
    assert two.token_ids == [] and two.finish_reason is None and second.finish_reason == "length"


def test_what_cannot_go_on_is_refused(engine: Engine) -> None:
    cases = [
        (LONG, [None], "one of them open"),
        (LONG, [[1], [2]], "found 2 choices, expected 1"),
        (LONG, [[1] * 20], "fewer than max_tokens = 20"),
        (LONG, [[10**6]], "token id 1000000"),
        (dataclasses.replace(LONG, best_of=2), [[1], [1]], "best_of"),
        (dataclasses.replace(LONG, prompt_logprobs=1), [[1]], "prompt_logprobs"),
    ]
    for sampling, emitted, message in cases:
        with pytest.raises(UserError, match=message):
            engine.submit(PROMPT, sampling, emitted=emitted)
    assert not engine.step()
