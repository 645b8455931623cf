"""The whole engine on a tiny random model: its greedy answers are those of a plain loop without any cache, whatever
happens around.
"""

import asyncio
import dataclasses
import random
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, EngineDead, PromptTooLong, QueueFull, SamplingParams, runner
from jaxstack.engine import config as config_module
from jaxstack.models.attention import dense_attention
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.compilation import CompileCounter
from jaxstack.runtime.errors import UserError
from jaxstack.training.initialize import fresh_decoder
from kernels.matmul import PackedWeight, available

VOCAB = byte_tokenizer().vocab_size
WINDOW = 96
MODEL = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=VOCAB + 13,  # padded beyond the tokenizer, as real models are
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    layer_windows=(None, 11, None),
    max_position_embeddings=WINDOW,
    initializer_range=0.3,
)
SETTINGS = EngineConfig(max_sequences=4, max_batch_tokens=64, page_size=4, num_pages=60)


def decoder() -> Decoder:
    return fresh_decoder(MODEL)


@pytest.fixture(scope="module")
def plain():
    """(tokens, count) -> the greedy continuation by a forward pass over everything for every token."""
    model = decoder()
    graph, state = nnx.split(model)

    @jax.jit
    def logits(tokens, length):
        positions = jnp.arange(WINDOW)[None]
        segments = (positions < length).astype(jnp.int32)
        out, _ = nnx.merge(graph, state)(tokens[None], positions, dense_attention(segments))
        return out[0, length - 1, :VOCAB]

    logits(np.zeros(WINDOW, np.int32), 1)  # compiled here, so that the engines' own count stays at zero
    known: dict[tuple, tuple] = {}

    def answer(prompt, count, margin=1e-4):
        """Stops early at a near-tie, where rounding decides."""
        tokens, out = list(prompt), []
        for _ in range(count):
            key = tuple(tokens)
            if key not in known:
                padded = np.zeros(WINDOW, np.int32)
                padded[: len(tokens)] = tokens
                row = np.asarray(logits(padded, len(tokens)))
                best = np.argsort(-row, kind="stable")[:2]
                known[key] = (int(best[0]), float(row[best[0]] - row[best[1]]))
            token, gap = known[key]
            if gap < margin:
                break
            out.append(token)
            tokens.append(token)
        return out

    return answer


@pytest.fixture(scope="module")
def engine(plain):
    made = Engine(decoder(), byte_tokenizer(), SETTINGS)
    made.warm_up(progress=False)
    return made


def prompts(seed: int, count: int, longest: int = 60) -> list[list[int]]:
    """Some share long beginnings, some are alike, some are a single token."""
    rng = random.Random(seed)
    stems = [[rng.randrange(256) for _ in range(40)] for _ in range(3)]
    out = []
    for _ in range(count):
        stem = rng.choice(stems)[: rng.randrange(41)]
        out.append((stem + [rng.randrange(256) for _ in range(rng.randrange(1, longest - 39))])[:longest])
    return out


def greedy(count: int, **more) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, **more)


def assert_same(engine, plain, asked, count):
    outputs = engine.generate(asked, greedy(count))
    for prompt, output in zip(asked, outputs):
        expected = plain(prompt, count)
        assert output.completions[0].token_ids[: len(expected)] == expected
        assert len(output.completions[0].token_ids) == count
        assert output.completions[0].finish_reason == "length"
    engine.scheduler.check_accounting()
    assert engine.scheduler.pool.private == 0
    return outputs


def test_greedy_equals_the_plain_loop_cold_and_cached(engine, plain):
    compiled = CompileCounter()
    asked = prompts(0, 12)
    assert_same(engine, plain, asked, 12)
    again = assert_same(engine, plain, asked, 12)
    assert sum(o.cached_tokens for o in again) > 0
    assert compiled.count == 0


def test_overlap_changes_no_token(engine, plain):
    """One engine, so that both ways run the same programs; drawn tokens, so that the random numbers count too."""
    rng = random.Random(9)
    asked = prompts(8, 14)
    sampling = [SamplingParams(max_tokens=rng.randrange(1, 20), seed=i, top_p=0.9, logprobs=1) for i in range(14)]
    answers = []
    for overlap in (True, False):
        engine._pipeline._overlap = overlap
        engine.scheduler.tree.clear()
        steps = engine.stats().steps
        outputs = engine.generate(asked, sampling)
        answers.append([(o.completions[0].token_ids, o.completions[0].finish_reason) for o in outputs])
        assert engine.scheduler.pool.private == 0 and engine.stats().steps > steps
        for output in outputs:
            assert [lp.token_id for lp in output.completions[0].logprobs] == output.completions[0].token_ids
    engine._pipeline._overlap = True
    assert answers[0] == answers[1]
    stats = engine.stats()
    assert 0 < stats.host_seconds < stats.step_seconds
    assert sum(stats.iteration_tokens.values()) == stats.steps
    assert sum(n * count for n, count in stats.iteration_tokens.items()) == stats.step_rows


def test_a_step_is_launched_before_the_last_one_is_read(engine, monkeypatch):
    events = []
    launch, settle = engine.runner.launch, engine._pipeline.settle
    monkeypatch.setattr(engine.runner, "launch", lambda batch: (events.append("launch"), launch(batch))[1])
    monkeypatch.setattr(engine._pipeline, "settle", lambda: (events.append("read"), settle())[1])
    answer = engine.generate([[1, 2, 3]], greedy(4))[0].completions[0].token_ids
    # max_tokens is known beforehand, so no step is launched in vain; the first "read" finds nothing.
    assert len(answer) == 4 and events == ["launch", "read"] * 4 + ["read"]
    events.clear()
    # The end at a stop token is learnt one step late: five launches for four tokens, the last token dropped.
    stop = next(i for i in range(1, 4) if answer[i] not in answer[:i])
    again = engine.generate([[1, 2, 3]], greedy(40, stop_token_ids=(answer[stop],)))[0].completions[0].token_ids
    assert again == answer[: stop + 1] and events.count("launch") == stop + 2


def test_best_of_gives_back_the_likeliest_and_counts_them_all(engine):
    every = engine.generate([[9, 8, 7]], SamplingParams(max_tokens=6, seed=3, n=5, logprobs=2))[0]
    best = engine.generate([[9, 8, 7]], SamplingParams(max_tokens=6, seed=3, n=2, best_of=5))[0]
    ranked = sorted(every.completions, key=lambda c: -sum(lp.logprob for lp in c.logprobs))
    assert [c.token_ids for c in best.completions] == [c.token_ids for c in ranked[:2]]
    assert [c.text for c in best.completions] == [c.text for c in ranked[:2]]
    assert all(c.logprobs is None for c in best.completions)
    assert best.discarded_tokens == sum(len(c.token_ids) for c in ranked[2:]) and every.discarded_tokens == 0


def test_a_deadline_ends_what_runs_and_what_waits(engine):
    pieces: dict[str, list] = {"a": [], "b": [], "c": []}
    engine.submit([1, 2], greedy(60), pieces["a"].append, "a", timeout_s=1e6)
    engine.submit([3, 4], greedy(60), pieces["b"].append, "b", timeout_s=2e6)
    for _ in range(6):
        engine.step()
    engine.submit([5, 6], greedy(5), pieces["c"].append, "c", timeout_s=1e6)
    engine._driver.take_in()
    engine._answers.expire(time.perf_counter() + 1.5e6)
    assert [d.finish_reason for d in pieces["a"]][-1] == "timeout" and 1 < len(pieces["a"]) < 10
    assert [(d.finish_reason, d.token_ids) for d in pieces["c"]] == [("timeout", ())]
    assert pieces["b"][-1].finish_reason is None
    engine.abort("b")
    while engine.step():
        pass
    assert engine.stats().running == engine.stats().pages_private == 0
    with pytest.raises(UserError, match="timeout_s: found -1"):
        engine.generate([[1]], greedy(1), timeout_s=-1)


def test_greedy_equals_the_plain_loop_under_preemption(plain):
    tight = Engine(decoder(), byte_tokenizer(), dataclasses.replace(SETTINGS, num_pages=24, max_batch_tokens=16))
    tight.warm_up(progress=False)
    asked = prompts(1, 10)
    assert_same(tight, plain, asked, 30)
    assert tight.stats().preemptions > 0
    assert tight.runner.recompilations == 0


def test_greedy_equals_the_plain_loop_without_prefix_cache_and_unpacked(plain, monkeypatch):
    monkeypatch.setattr(runner, "_compilers", lambda: 3)  # as for an accelerator
    bare = Engine(decoder(), byte_tokenizer(), dataclasses.replace(SETTINGS, prefix_caching=False, pack_weights=False))
    outputs = assert_same(bare, plain, prompts(2, 8), 10)
    assert sum(o.cached_tokens for o in outputs) == 0
    assert bare.scheduler.pool.free == bare.scheduler.pool.size


def test_an_accelerator_is_told_what_rows_ask_for_and_draws_the_same(engine):
    """With a sampler of its own for greedy rows and for plain ones, as on a GPU."""
    other = Engine(decoder(), byte_tokenizer(), SETTINGS)
    other.runner.sampler.kinds = ("greedy", "plain", "any")
    told: list[str] = []
    draw = other.runner.sampler.draw
    other.runner.sampler.draw = lambda logits, draws: told.append(draws.kind) or draw(logits, draws)
    other.warm_up(progress=False)
    told.clear()
    sampled = SamplingParams(max_tokens=9, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True)
    ways = [greedy(5), sampled, dataclasses.replace(sampled, logprobs=2), dataclasses.replace(sampled, min_tokens=3)]
    for way in (*ways, [ways[i % 4] for i in range(9)]):
        asked = prompts(6, 9, longest=41)
        found, wanted = ([o.completions for o in e.generate(asked, way)] for e in (other, engine))
        assert found == wanted
    assert set(told) == {"greedy", "plain", "any"} and other.runner.recompilations == 0


def test_the_cache_of_an_accelerator_takes_what_weights_leave(monkeypatch):
    memory = {"bytes_limit": 10 << 20, "bytes_in_use": 1 << 20}
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: memory)
    monkeypatch.setattr(config_module.jax, "local_devices", lambda: [device])
    page = MODEL.num_layers * 4 * 2 * MODEL.num_kv_heads * MODEL.head_dim * 4
    found = config_module.sizes(dataclasses.replace(SETTINGS, num_pages=None, max_sequences=60), MODEL, 4).num_pages
    assert found == (8 << 20) // page
    memory["bytes_in_use"] = 9 << 20
    with pytest.raises(UserError, match="num_pages: found 0"):
        config_module.sizes(dataclasses.replace(SETTINGS, num_pages=None), MODEL, 4)


def test_bfloat16_greedy_is_that_of_float32_where_the_choice_is_clear(plain):
    half = Engine(decoder(), byte_tokenizer(), dataclasses.replace(SETTINGS, dtype="bfloat16", max_sequences=1))
    packed = jax.tree.leaves(half.runner._weights, is_leaf=lambda leaf: isinstance(leaf, PackedWeight))
    assert [leaf.dtype for leaf in packed if isinstance(leaf, PackedWeight)] == [jnp.bfloat16] * (5 * available())
    asked = prompts(4, 24)
    compared = 0
    for prompt, output in zip(asked, half.generate(asked, greedy(8))):
        expected = plain(prompt, 8, margin=0.2)
        compared += len(expected)
        assert output.completions[0].token_ids[: len(expected)] == expected
    assert compared > 20


def test_greedy_equals_the_plain_loop_amid_aborts(engine, plain):
    compiled = CompileCounter()
    rng = random.Random(3)
    asked = prompts(3, 24)
    answers: dict[str, list] = {}
    ends: dict[str, str] = {}
    names = {}

    def listen(name):
        def listener(delta):
            answers.setdefault(name, []).extend(delta.token_ids)
            if delta.finish_reason:
                ends[name] = delta.finish_reason

        return listener

    waiting = list(range(len(asked)))
    for _ in range(2000):
        if waiting and rng.random() < 0.5:
            i = waiting.pop()
            names[i] = engine.submit(asked[i], greedy(14), listen(i))
        if rng.random() < 0.08 and names:
            engine.abort(names[rng.choice(list(names))])
        engine.step()
        engine.scheduler.check_accounting()
        if not waiting and len(ends) == len(asked):
            break
    assert len(ends) == len(asked) and set(ends.values()) == {"length", "abort"}
    for i, prompt in enumerate(asked):
        expected = plain(prompt, 14)[: len(answers[i])]
        assert answers[i][: len(expected)] == expected
    assert engine.scheduler.pool.private == 0 and compiled.count == 0


def test_every_feature_without_recompiling(engine):
    features = [
        SamplingParams(max_tokens=5, seed=1),
        SamplingParams(max_tokens=5, seed=1, top_k=3),
        SamplingParams(max_tokens=5, seed=1, top_p=0.5, temperature=0.5, logprobs=3),
        SamplingParams(max_tokens=5, seed=1, n=3),
        SamplingParams(max_tokens=5, temperature=0.0, logprobs=0),
        SamplingParams(max_tokens=5, top_k=100, top_p=0.9, seed=4),
        SamplingParams(max_tokens=None, temperature=0.0),
        SamplingParams(max_tokens=5, seed=2, prompt_logprobs=2),
        SamplingParams(max_tokens=5, seed=2, n=2, best_of=3),
    ]
    asked = prompts(4, len(features))
    compiled = CompileCounter()
    together = engine.generate(asked, features)
    assert compiled.count == 0
    for prompt, sampling, output in zip(asked, features, together):
        assert len(output.completions) == sampling.n
        alone = engine.generate([prompt], sampling)[0]
        assert [c.token_ids for c in alone.completions] == [c.token_ids for c in output.completions]
        for c in output.completions:
            assert all(0 <= t < VOCAB for t in c.token_ids)
            assert (c.logprobs is None) == (sampling.logprobs is None)
            if c.logprobs:
                assert [lp.token_id for lp in c.logprobs] == c.token_ids
                assert all(len(lp.top) == sampling.logprobs for lp in c.logprobs)
    choices = together[3].completions
    assert len({tuple(c.token_ids) for c in choices}) > 1


def test_stop_rules(engine, plain):
    prompt = prompts(5, 1)[0]
    tokens = engine.generate([prompt], greedy(20))[0].completions[0].token_ids
    cut = next(i for i in range(4, 20) if tokens[i] not in tokens[:i])
    stopped = engine.generate([prompt], greedy(20, stop_token_ids=(tokens[cut],)))[0].completions[0]
    assert stopped.token_ids == tokens[: cut + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", tokens[cut])

    text = engine.generate([prompt], greedy(20))[0].completions[0].text
    marker = next(text[i] for i in range(2, len(text)) if text[i] not in text[:i] and text[i] != "\ufffd")
    stopped = engine.generate([prompt], greedy(20, stop=(marker,)))[0].completions[0]
    assert stopped.text == text[: text.index(marker)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", marker)


def test_streams_from_an_event_loop_and_closing_one_frees_its_pages(plain):
    engine = Engine(decoder(), byte_tokenizer(), SETTINGS)
    engine.start(progress=False)
    asked = prompts(6, 8)

    async def read(prompt):
        pieces = [d async for d in engine.stream(prompt, greedy(10))]
        assert pieces[-1].finish_reason == "length" and all(p.finish_reason is None for p in pieces[:-1])
        return [t for d in pieces for t in d.token_ids]

    async def leave_early():
        stream = engine.stream(asked[0], greedy(30))
        async for _ in stream:
            break
        await stream.aclose()
        steps = engine.stats().steps
        while engine.stats().running:
            await asyncio.sleep(0.001)
        return engine.stats().steps - steps

    async def both():
        answers = await asyncio.gather(*(read(p) for p in asked))
        return answers, await leave_early()

    answers, extra_steps = asyncio.run(both())
    for prompt, answer in zip(asked, answers):
        expected = plain(prompt, 10)
        assert answer[: len(expected)] == expected
    assert extra_steps <= 2  # the one in flight, and the one that notices
    assert engine.stats().pages_private == 0
    # From other threads at once, and after the thread's end.
    results = []
    threads = [threading.Thread(target=lambda p=p: results.append(engine.generate([p], greedy(4)))) for p in asked[:3]]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 3
    engine.close()
    with pytest.raises(EngineDead):
        engine.submit(asked[0])


def test_a_failing_step_ends_its_requests_and_nobody_elses(plain, monkeypatch, caplog):
    engine = Engine(decoder(), byte_tokenizer(), SETTINGS)
    engine.start(progress=False)
    launch = engine.runner.launch
    armed = threading.Event()

    def failing(batch):
        if armed.is_set():
            armed.clear()
            raise RuntimeError("a broken step")
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", failing)
    prompt = prompts(7, 1)[0]
    armed.set()
    assert engine.generate([prompt], greedy(5))[0].completions[0].finish_reason == "error"
    answer = engine.generate([prompt], greedy(5))[0].completions[0].token_ids
    expected = plain(prompt, 5)
    assert answer[: len(expected)] == expected
    assert engine.stats().alive and "a broken step" in caplog.text

    def broken(batch):
        raise RuntimeError("broken for good")

    monkeypatch.setattr(engine.runner, "launch", broken)
    for _ in range(3):
        engine.generate([prompt], greedy(5))
    engine._driver._thread.join(timeout=10)
    assert not engine.stats().alive
    with pytest.raises(EngineDead):
        engine.submit(prompt)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([], SamplingParams(), "no tokens"),
        ([1, -1], SamplingParams(), "token id -1"),
        ([MODEL.vocab_size], SamplingParams(), f"token id {MODEL.vocab_size}"),
        ([1] * WINDOW, SamplingParams(max_tokens=1), f"found {WINDOW} tokens and 1"),
        ("", SamplingParams(), "no tokens"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_next_one_works(engine, prompt, sampling, message):
    with pytest.raises(UserError, match=message):
        engine.generate([[5, 6], prompt], sampling)
    assert engine.stats().running == engine.stats().waiting == 0
    assert engine.generate([[5, 6]], greedy(2))[0].completions[0].finish_reason == "length"


def test_the_queue_has_a_limit(plain):
    engine = Engine(decoder(), byte_tokenizer(), dataclasses.replace(SETTINGS, max_waiting=3))
    for _ in range(3):
        engine.submit([1, 2], greedy(2))
    with pytest.raises(QueueFull, match="3 requests wait"):
        engine.submit([1, 2], greedy(2))
    with pytest.raises(PromptTooLong):
        engine.check_prompt([1] * 90, greedy(10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 3}, "page_size: found 3, expected a power of two"),
        ({"max_sequences": 0}, "max_sequences: found 0"),
        ({"max_batch_tokens": 2}, "max_batch_tokens: found 2, expected at least max_sequences = 4"),
        ({"dtype": "int8"}, "dtype: found 'int8'"),
        ({"max_model_len": 1000}, "max_model_len: found 1000, expected at most the model's"),
        ({"num_pages": 3}, "num_pages: found 3, expected at least 2 for each"),
    ],
)
def test_bad_settings_get_one_line(change, message):
    with pytest.raises(UserError, match=message) as error:
        Engine(decoder(), byte_tokenizer(), dataclasses.replace(SETTINGS, **change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"top_p": 0.0}, "top_p: found 0.0"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"n": 0}, "n: found 0"),
        ({"stop": ("",)}, "stop: found"),
        ({"logprobs": 21}, "logprobs: found 21"),
        ({"seed": -1}, "seed: found -1"),
    ],
)
def test_bad_sampling_parameters_get_one_line(change, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**change)


def test_steps_update_the_cache_in_place():
    """A copy of the cache in any step would show as temporary memory; it is large here beside everything else."""
    runner = Engine(decoder(), byte_tokenizer(), dataclasses.replace(SETTINGS, num_pages=4000)).runner
    assert runner.cache_bytes > 12e6
    for shape in runner.shapes:
        memory = runner.compile(shape).memory_analysis()
        assert memory.alias_size_in_bytes >= runner.cache_bytes
        assert memory.temp_size_in_bytes < runner.cache_bytes / 4
