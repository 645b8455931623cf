"""Bias, masks, penalties and grammars in the whole engine: against a plain loop without a cache, and beside each other
in one batch.
"""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, Guide, SamplingParams
from jaxstack.models.attention import dense_attention
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.compilation import CompileCounter
from jaxstack.runtime.errors import UserError

VOCAB = byte_tokenizer().vocab_size
EOS = 260
WINDOW = 96
MODEL = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=VOCAB + 13,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    layer_windows=(None,),
    max_position_embeddings=WINDOW,
    initializer_range=0.3,
)
SETTINGS = EngineConfig(max_sequences=4, max_batch_tokens=32, page_size=4, num_pages=60)
PROMPT = list(b"a first prompt")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
}
SCHEMA = json.dumps({**SCHEMA, "additionalProperties": False})


def make(**changes) -> Engine:
    made = Engine(Decoder(MODEL, rngs=nnx.Rngs(0)), byte_tokenizer(), dataclasses.replace(SETTINGS, **changes))
    made.warm_up(progress=False)
    return made


@pytest.fixture(scope="module")
def logits_of():
    """tokens -> the next token's logits, by a forward pass over everything."""
    graph, state = nnx.split(Decoder(MODEL, rngs=nnx.Rngs(0)))

    @jax.jit
    def logits(tokens, length):
        positions = jnp.arange(WINDOW)[None]
        segments = (positions < length).astype(jnp.int32)
        out, _ = nnx.merge(graph, state)(tokens[None], positions, dense_attention(segments))
        return out[0, length - 1]

    def row(tokens):
        padded = np.zeros(WINDOW, np.int32)
        padded[: len(tokens)] = tokens
        z = np.array(logits(padded, len(tokens)), np.float64)
        z[VOCAB:] = -np.inf
        return z

    row([1])  # compiled here, so that the engines' own count stays at zero
    return row


@pytest.fixture(scope="module")
def engine(logits_of):
    return make()


def plain(logits_of, prompt, sampling):
    """The greedy answer under bias, allowed tokens and penalties; ends at a near-tie, where rounding decides."""
    answer = []
    while len(answer) < sampling.max_tokens:
        z = logits_of([*prompt, *answer])
        for token, value in sampling.biases:
            z[token] += value
        if sampling.allowed_token_ids is not None:
            z[~np.isin(np.arange(len(z)), sampling.allowed_token_ids)] = -np.inf
        if len(answer) < sampling.min_tokens:
            z[[EOS, *byte_tokenizer().eos_token_ids, *sampling.stop_token_ids]] = -np.inf
        for token in {*prompt, *answer}:
            z[token] = (
                z[token] / sampling.repetition_penalty if z[token] > 0 else z[token] * sampling.repetition_penalty
            )
        counts = np.bincount(np.asarray(answer, int), minlength=len(z))
        z -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
        best = np.argsort(-z, kind="stable")[:2]
        if z[best[0]] - z[best[1]] < 1e-3:
            break
        answer.append(int(best[0]))
        if best[0] in (*byte_tokenizer().eos_token_ids, *sampling.stop_token_ids) and not sampling.ignore_eos:
            break
    return answer


GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
RULES = {
    "repetition": {"repetition_penalty": 1.4},
    "frequency": {"frequency_penalty": 1.3},
    "presence": {"presence_penalty": 1.9, "frequency_penalty": -0.4},
    "all three": {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {65: 3.0, 66: -100.0, EOS: 2.0}, "frequency_penalty": 0.2},
    "allowed": {"allowed_token_ids": tuple(range(97, 123)), "repetition_penalty": 1.3},
    "end": {"ignore_eos": False, "logit_bias": {EOS: 100.0}, "min_tokens": 7},
    "stop": {"ignore_eos": False, "logit_bias": {90: 100.0}, "stop_token_ids": (90,), "min_tokens": 3},
}


def prompts():
    rng = np.random.default_rng(0)
    return [PROMPT + rng.integers(0, 256, n).tolist() for n in (0, 5, 21, 40)]


def test_greedy_under_rules_equals_the_plain_loop_all_in_one_batch(engine, logits_of):
    compiled = CompileCounter()
    asked = [(p, dataclasses.replace(GREEDY, **rules)) for p in prompts() for rules in RULES.values()]
    outputs = engine.generate([p for p, _ in asked], [s for _, s in asked])
    checked = 0
    for (prompt, sampling), output in zip(asked, outputs):
        expected = plain(logits_of, prompt, sampling)
        found = output.completions[0].token_ids
        assert found[: len(expected)] == expected
        checked += len(expected)
    assert checked > 20 * len(asked) // 2
    assert compiled.count == engine.runner.recompilations == 0


def test_min_tokens_holds_the_end_back(engine):
    end = SamplingParams(max_tokens=24, temperature=0.0, logit_bias={EOS: 100.0})
    at_once, later = engine.generate([PROMPT] * 2, [end, dataclasses.replace(end, min_tokens=9)])
    assert at_once.completions[0].token_ids == [EOS]
    assert len(later.completions[0].token_ids) == 10
    assert later.completions[0].finish_reason == "stop"


def test_guided_answers_follow_their_grammars_beside_plain_ones(engine):
    compiled = CompileCounter()
    samplings = [
        SamplingParams(max_tokens=60, seed=1, guide=Guide("json_schema", SCHEMA)),
        SamplingParams(max_tokens=60, seed=2, temperature=0.0, guide=Guide("choice", '["red", "green", "blue"]')),
        SamplingParams(max_tokens=60, seed=3, guide=Guide("regex", "[a-f]{3}-[0-9]{2}"), n=3),
        SamplingParams(max_tokens=20, seed=4, ignore_eos=True),
        SamplingParams(max_tokens=20, seed=5, ignore_eos=True, top_p=0.9, presence_penalty=1.0),
        SamplingParams(max_tokens=60, guide=Guide("regex", "no?"), ignore_eos=True, min_tokens=2),
        SamplingParams(max_tokens=5, seed=7, guide=Guide("json_object"), top_k=3),
    ]
    outputs = engine.generate([PROMPT] * len(samplings), samplings)
    schema, choice, regex, free, penalised, ends, cut = outputs
    for output in (schema, choice, regex, ends):
        assert all(c.finish_reason == "stop" for c in output.completions)
    assert set(json.loads(schema.completions[0].text)) == {"a", "b"}
    assert choice.completions[0].text in ("red", "green", "blue")
    assert len(regex.completions) == 3
    assert all(re.fullmatch("[a-f]{3}-[0-9]{2}", c.text) for c in regex.completions)
    assert ends.completions[0].text in ("n", "no")
    assert cut.completions[0].finish_reason == "length"
    assert cut.completions[0].text.startswith("{")
    # The plain ones are what they are alone.
    for i, output in ((3, free), (4, penalised)):
        alone = engine.generate([PROMPT], samplings[i])[0]
        assert alone.completions[0].token_ids == output.completions[0].token_ids
    assert compiled.count == engine.runner.recompilations == 0


def test_a_grammar_and_allowed_tokens_that_exclude_each_other_end_in_an_error_alone(engine):
    before = engine.stats().corrupted_requests
    stuck = SamplingParams(max_tokens=9, guide=Guide("regex", "abc"), allowed_token_ids=(97, 100))
    fine = dataclasses.replace(GREEDY, max_tokens=9)
    lost, kept = engine.generate([PROMPT] * 2, [stuck, fine])
    assert lost.completions[0].finish_reason == "error"
    assert lost.completions[0].text == "a"
    assert kept.completions[0].finish_reason == "length"
    assert engine.stats().corrupted_requests == before  # the model did nothing wrong


def test_steps_ahead_of_their_results_and_preemption_change_nothing(engine):
    samplings = [dataclasses.replace(GREEDY, max_tokens=30, **rules) for rules in RULES.values()]
    guides = [Guide("json_schema", SCHEMA), Guide("regex", "([a-z]+ ){4}[0-9]")]
    samplings += [SamplingParams(max_tokens=40, seed=8 + i, guide=guide) for i, guide in enumerate(guides)]
    asked = [(prompts()[i % 4], s) for i, s in enumerate(samplings)]
    ask = lambda e: [o.completions[0].token_ids for o in e.generate([p for p, _ in asked], [s for _, s in asked])]  # noqa: E731
    expected = ask(engine)
    short = make(overlap=False, num_pages=26)
    assert ask(short) == expected
    assert short.stats().preemptions > 0
    again = make(num_pages=26)
    assert ask(again) == expected
    assert again.stats().preemptions > 0


def test_processed_logprobs_are_those_of_the_allowed_tokens(engine):
    sampling = SamplingParams(max_tokens=3, temperature=0.0, allowed_token_ids=(97, 98), logprobs=2, ignore_eos=True)
    raw, processed = (
        engine.generate([PROMPT], dataclasses.replace(sampling, logprobs_mode=mode))[0].completions[0].logprobs
        for mode in ("raw", "processed")
    )
    for entry in processed:
        assert {token for token, _ in entry.top} == {97, 98}
        assert sum(np.exp(value) for _, value in entry.top) == pytest.approx(1, abs=1e-5)
    assert all(p.logprob > r.logprob for p, r in zip(processed, raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, f"logit_bias: found {VOCAB}, expected token ids from 0 to {VOCAB - 1}"),
        ({"allowed_token_ids": (VOCAB + 2,)}, f"allowed_token_ids: found {VOCAB + 2}"),
        ({"guide": Guide("regex", "(")}, "regex: .*unclosed group"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_door(engine, change, message):
    for ask in (engine.submit, lambda p, s: engine.generate([p], s)):
        with pytest.raises(UserError, match=message):
            ask(PROMPT, SamplingParams(**change))
    assert not engine.step()
