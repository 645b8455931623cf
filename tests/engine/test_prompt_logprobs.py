"""Logprobs of prompts against a plain forward pass: cold, cached, in chunks, after preemption."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.engine.prompt_scores import PageScores, PromptScores
from jaxstack.models.attention import dense_attention
from jaxstack.models.decoder import DecoderConfig
from jaxstack.runtime.compilation import CompileCounter
from jaxstack.training.initialize import fresh_decoder

VOCAB = 61
MODEL = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    qkv_bias=True,
    max_position_embeddings=256,
    initializer_range=0.3,
)


@pytest.fixture(scope="module")
def engine(expected) -> Engine:
    made = Engine(
        fresh_decoder(MODEL),
        None,
        EngineConfig(max_sequences=4, max_batch_tokens=64, page_size=4, num_pages=120),
    )
    made.warm_up(progress=False)
    return made


@pytest.fixture(scope="module")
def expected():
    """prompt -> [tokens, vocab] logprobs of what follows each position, in float32 without a cache."""
    graph, state = nnx.split(fresh_decoder(MODEL))

    @jax.jit
    def forward(tokens, length):
        positions = jnp.arange(256)[None]
        attend = dense_attention((positions < length).astype(jnp.int32))
        logits, _ = nnx.merge(graph, state)(tokens[None], positions, attend)
        return jax.nn.log_softmax(logits[0])

    def answer(prompt: list[int]) -> np.ndarray:
        return np.asarray(forward(np.array(prompt + [0] * (256 - len(prompt))), len(prompt)))

    answer([1])
    return answer


def wants(alternatives: int | None, count: int = 3, **more) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, prompt_logprobs=alternatives, **more)


def assert_right(output, prompt: list[int], alternatives: int, truth: np.ndarray) -> None:
    found = output.prompt_logprobs
    assert len(found) == len(prompt) and found[0] is None
    for i, entry in enumerate(found[1:], 1):
        row = truth[i - 1]
        assert entry.token_id == prompt[i] and abs(entry.logprob - row[prompt[i]]) < 2e-4
        assert len(entry.top) == alternatives
        for rank, (token, value) in enumerate(entry.top):
            assert abs(value - row[token]) < 2e-4 and abs(value - np.sort(row)[-1 - rank]) < 2e-4


def test_cold_cached_and_in_chunks(engine, expected):
    rng = random.Random(0)
    long = [rng.randrange(VOCAB) for _ in range(150)]  # more than a step's tokens
    prompts = [long, [*long[:21], 1, 2, 3], [5], [5, 6], long[:20]]
    compiled = CompileCounter()
    steps = [engine.stats().steps]
    outputs = engine.generate(prompts, wants(2))
    steps.append(engine.stats().steps)
    again = engine.generate(prompts, wants(3))
    steps.append(engine.stats().steps)
    plain = engine.generate(prompts, wants(None))
    assert compiled.count == 0
    for prompt, output, cached, bare in zip(prompts, outputs, again, plain):
        assert_right(output, prompt, 2, expected(prompt))
        assert_right(cached, prompt, 3, expected(prompt))
        assert bare.prompt_logprobs is None
        tokens = [o.completions[0].token_ids for o in (output, cached, bare)]
        assert tokens[0] == tokens[1] == tokens[2]
    assert again[0].cached_tokens == 147  # 37 pages with their scores, the last position computed again
    stored = [[lp.logprob for lp in o[0].prompt_logprobs[1:148]] for o in (outputs, again)]
    assert stored[0] == stored[1]
    assert steps[2] - steps[1] < steps[1] - steps[0]


def test_a_hit_without_stored_scores_computes_from_there(engine, expected):
    rng = random.Random(1)
    stem = [rng.randrange(VOCAB) for _ in range(24)]
    tail = [rng.randrange(VOCAB) for _ in range(30)]
    engine.generate([stem], wants(0))  # scores of six pages, five of them sharable
    engine.generate([stem + tail], wants(None))  # keys and values of all, no more scores
    output = engine.generate([stem + tail], wants(1))[0]
    assert_right(output, stem + tail, 1, expected(stem + tail))
    assert output.cached_tokens == 23
    assert engine.generate([stem + tail], wants(1))[0].cached_tokens == 51
    engine.scheduler.check_accounting()


def test_with_many_choices_and_under_preemption(engine, expected):
    rng = random.Random(2)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(60, 110))] for _ in range(6)]
    before = engine.stats().preemptions
    outputs = engine.generate(prompts, wants(1, 60, ignore_eos=True))
    for prompt, output in zip(prompts, outputs):
        assert_right(output, prompt, 1, expected(prompt))
    assert engine.stats().preemptions > before
    several = engine.generate(prompts[:2], wants(1, 4, n=3, seed=1))
    best = engine.generate(prompts[:2], wants(1, 4, n=1, best_of=3, seed=1))
    for prompt, output, kept in zip(prompts, several, best):
        assert_right(output, prompt, 1, expected(prompt))
        assert_right(kept, prompt, 1, expected(prompt))


def test_pages_and_entries_agree():
    rng = np.random.default_rng(0)
    tokens = tuple(range(11))
    arrays = PageScores(
        rng.normal(size=10).astype(np.float32), rng.integers(0, 9, (10, 4)), rng.normal(size=(10, 4)).astype(np.float32)
    )
    cold = PromptScores(tokens, 2)
    for start, end in ((0, 3), (3, 4), (4, 10)):
        cold.add(start + 1, PageScores(*(a[start:end] for a in arrays)))
    assert cold.complete and [e and e.token_id for e in cold.entries()] == [None, *tokens[1:]]
    pages = cold.pages(4)
    assert len(pages) == 2
    warm = PromptScores(tokens, 2)
    for i, page in enumerate(pages):
        warm.add(4 * i, page)
    assert warm.known == 8
    warm.add(6, PageScores(*(np.concatenate([a[5:10], a[:3]]) for a in arrays)))  # overlapping, and past the end
    assert warm.complete and warm.entries() == cold.entries()
