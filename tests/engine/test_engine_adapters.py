"""LoRA adapters in a running engine: each answers as its merged model would, in any company, and comes and goes while
others work.
"""

import dataclasses
import random
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import EmbeddingPrompt, Engine, EngineConfig, SamplingParams
from jaxstack.models import Decoder, DecoderConfig, dense_attention, lora
from jaxstack.models.peft_format import save_peft
from jaxstack.runtime.errors import UserError

WINDOW = 64
MODEL = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    max_position_embeddings=WINDOW,
)
SETTINGS = EngineConfig(
    max_sequences=4, max_batch_tokens=32, page_size=4, num_pages=60, max_adapters=2, max_adapter_rank=4
)
SHAPES = {
    "one": lora.LoraConfig(r=2, alpha=4.0),
    "two": lora.LoraConfig(r=4, alpha=2.0, targets=("q_proj", "v_proj", "down_proj"), use_rslora=True),
    "three": lora.LoraConfig(r=3, targets=("o_proj", "gate_proj")),
    "wide": lora.LoraConfig(r=5, targets=("up_proj",)),
}


def decoder() -> Decoder:
    model, rng = Decoder.abstract(MODEL), np.random.default_rng(0)
    nnx.update(
        model, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), nnx.state(model))
    )
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Adapter folders, and what they hold."""
    rng, made, factors = np.random.default_rng(1), {}, {}
    for number, (name, config) in enumerate(SHAPES.items()):
        model = decoder()
        lora.attach(model, config, seed=number)
        factors[name] = {
            m: dataclasses.replace(f, b=rng.normal(size=f.b.shape).astype(np.float32))
            for m, f in lora.adapter_factors(model, config).items()
        }
        lora.set_adapters(model, [factors[name]])
        made[name] = tmp_path_factory.mktemp("adapters") / name
        save_peft(model, made[name], config)
    return made, factors


@pytest.fixture(scope="module")
def plain(folders):
    """(adapter or None, prompt, count) -> the greedy answer of the merged model, recomputed whole for every token."""

    @jax.jit
    def logits(graph_state, tokens, length):
        positions = jnp.arange(WINDOW)[None]
        out, _ = nnx.merge(graph, graph_state)(tokens[None], positions, dense_attention(positions < length))
        return out[0, length - 1]

    states = {}
    for name in (None, *folders[1]):
        model = decoder()
        if name is not None:
            lora.set_adapters(model, [folders[1][name]])
            model = lora.merge(model)
        graph, states[name] = nnx.split(model)

    def answer(name, prompt, count):
        """Stops at a near-tie, where rounding decides."""
        tokens, out = list(prompt), []
        for _ in range(count):
            padded = np.zeros(WINDOW, np.int32)
            padded[: len(tokens)] = tokens
            row = np.asarray(logits(states[name], padded, len(tokens)))
            best = np.argsort(-row, kind="stable")[:2]
            if row[best[0]] - row[best[1]] < 1e-3:
                break
            out.append(int(best[0]))
            tokens.append(out[-1])
        return out

    answer(None, [1], 1)
    return answer


@pytest.fixture(scope="module")
def engine(plain):
    made = Engine(decoder(), None, SETTINGS)
    made.warm_up(progress=False)
    yield made
    made.close()


@pytest.fixture
def loaded(engine, folders):
    for name in ("one", "two"):
        engine.load_adapter(name, folders[0][name])
    yield engine
    for name in engine.adapters:
        engine.unload_adapter(name)
    engine.scheduler.check_accounting()
    assert not [n for n in engine.scheduler.tree._roots if isinstance(n, tuple)]


GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def prompts(seed, count):
    rng = random.Random(seed)
    stem = [rng.randrange(101) for _ in range(13)]
    return [stem[: rng.randrange(14)] + [rng.randrange(101) for _ in range(rng.randrange(1, 9))] for _ in range(count)]


def assert_answers(plain, name, prompt, output):
    expected = plain(name, prompt, 8)
    assert output.completions[0].token_ids[: len(expected)] == expected
    assert len(output.completions[0].token_ids) == 8


def test_every_row_of_a_mixed_batch_answers_with_its_own_adapter(loaded, plain):
    asked, results = prompts(0, 9), {}
    for i, prompt in enumerate(asked):
        done = results[i] = []
        loaded.submit(prompt, GREEDY, done.append, adapter=(None, "one", "two")[i % 3])
    while loaded.step():
        pass
    different = 0
    for i, prompt in enumerate(asked):
        name = (None, "one", "two")[i % 3]
        found = [token for delta in results[i] for token in delta.token_ids]
        expected = plain(name, prompt, 8)
        assert found[: len(expected)] == expected
        different += name is not None and found != plain(None, prompt, 8)
    assert different >= 5


def test_cached_prefixes_belong_to_one_adapter(loaded, plain):
    prompt = prompts(1, 1)[0] + [5] * 12
    cached = []
    for name in (None, "one", "two", "one", "two", None):
        (output,) = loaded.generate([prompt], GREEDY, adapter=name)
        assert_answers(plain, name, prompt, output)
        cached.append(output.cached_tokens)
    assert cached[1:3] == [0, 0]
    assert min(cached[3:]) >= 12


def test_a_name_loaded_again_is_another_adapter(loaded, folders, plain):
    prompt = prompts(2, 1)[0] + [6] * 8
    loaded.generate([prompt], GREEDY, adapter="two")
    loaded.unload_adapter("two")
    loaded.load_adapter("two", folders[0]["three"])
    (output,) = loaded.generate([prompt], GREEDY, adapter="two")
    assert output.cached_tokens == 0
    assert_answers(plain, "three", prompt, output)


def test_an_adapter_in_use_drains_before_it_is_unloaded(loaded, folders, plain):
    (prompt,) = prompts(3, 1)
    pieces = []
    loaded.submit(prompt, GREEDY, pieces.append, adapter="one")
    loaded.step()
    loaded.unload_adapter("one")
    assert pieces[-1].finish_reason == "length"
    assert [t for p in pieces for t in p.token_ids][:8] == plain("one", prompt, 8)[:8]
    with pytest.raises(UserError, match=r"found 'one', expected one that is loaded \(two\)"):
        loaded.submit(prompt, GREEDY, adapter="one")
    loaded.load_adapter("three", folders[0]["three"])


def test_adapters_come_and_go_beside_running_requests(engine, folders, plain):
    """With a step thread of its own, from several threads at once."""
    engine.start(progress=False)
    engine.load_adapter("one", folders[0]["one"])
    failures = []

    def ask(name, seed):
        try:
            for prompt in prompts(seed, 3):
                (output,) = engine.generate([prompt], GREEDY, adapter=name)
                assert_answers(plain, name, prompt, output)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(name, seed)) for seed, name in enumerate((None, "one", "one"))]
    for thread in threads:
        thread.start()
    for name in ("two", "three"):
        engine.load_adapter(name, folders[0][name])
        ask(name, 7)
        engine.unload_adapter(name)
    for thread in threads:
        thread.join()
    assert not failures
    engine.unload_adapter("one")
    assert engine.adapters == ()
    deadline = time.monotonic() + 300
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.stats().recompilations == 0


def hidden_states(prompt, name, factors):
    model = decoder()
    if name is not None:
        lora.set_adapters(model, [factors[name]])
        model = lora.merge(model)
    tokens = jnp.asarray([prompt])
    return np.asarray(model.hidden(tokens, jnp.arange(len(prompt))[None], dense_attention())[0][0])


def test_embeddings_are_the_hidden_states_pooled(folders, plain):
    made = Engine(decoder(), None, SETTINGS)
    made.warm_up(progress=False)
    made.load_adapter("one", folders[0]["one"])
    asked = [[7], prompts(5, 1)[0] + list(range(45)), prompts(6, 1)[0]]
    for name in (None, "one"):
        for pooling in ("last", "mean", "last"):  # the second time from the prefix cache
            found = made.embed(asked, pooling, name)
            for prompt, vector in zip(asked, found):
                states = hidden_states(prompt, name, folders[1])
                np.testing.assert_allclose(vector, states[-1] if pooling == "last" else states.mean(0), atol=2e-4)
    with pytest.raises(UserError, match="pooling: found 'max', expected one of mean, last"):
        made.embed(asked, "max")
    made.scheduler.check_accounting()


def test_prompts_as_embeddings(plain):
    model = decoder()
    table = np.asarray(model.embed.embedding.get_value())
    made = Engine(model, None, SETTINGS)
    made.warm_up(progress=False)
    prompt = prompts(8, 1)[0] + [9] * 21
    rows = table[prompt]
    half = [token if i % 2 else -1 for i, token in enumerate(prompt)]
    for ids in (None, half):
        asked = EmbeddingPrompt(rows, ids)
        for again in (False, True):
            (output,) = made.generate([asked], GREEDY)
            assert_answers(plain, None, prompt, output)
            assert (output.cached_tokens > 0) == again
    other = rows.copy()
    other[1] += 0.5
    (output,) = made.generate([EmbeddingPrompt(other)], GREEDY)
    assert output.cached_tokens == 0
    np.testing.assert_allclose(made.embed([EmbeddingPrompt(rows)])[0], made.embed([prompt])[0], atol=1e-4)
    assert made.stats().recompilations == 0
    for bad, message in (
        (EmbeddingPrompt(rows[:, :5]), "expected numbers"),
        (EmbeddingPrompt(rows, [1]), "found 1 token ids"),
        (EmbeddingPrompt(rows * np.nan), "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            made.generate([bad], GREEDY)


def test_new_weights(folders, plain):
    """The weights of the model that adapter "one" was merged into: the rest of an answer is theirs."""
    made = Engine(decoder(), None, SETTINGS)
    made.warm_up(progress=False)
    prompt = prompts(9, 1)[0] + [3] * 9
    (output,) = made.generate([prompt], GREEDY)
    assert_answers(plain, None, prompt, output)
    assert output.completions[0].weights_version == 0
    other = decoder()
    lora.set_adapters(other, [folders[1]["one"]])
    other = lora.merge(other)
    ended, kept = [], []
    made.submit(prompt, GREEDY, ended.append)
    for _ in range(3):
        made.step()
    made.update_weights(nnx.merge(*nnx.split(other)), abort=True)
    assert ended[-1].finish_reason == "abort"
    made.submit(prompt, GREEDY, kept.append)
    made.update_weights(other)
    while made.step():
        pass
    assert kept[-1].finish_reason == "length"
    assert kept[-1].weights_version == made.weights_version == 2
    (output,) = made.generate([prompt], GREEDY)
    assert_answers(plain, "one", prompt, output)
    with pytest.raises(UserError, match="another configuration"):
        made.update_weights(Decoder.abstract(dataclasses.replace(MODEL, rms_norm_eps=1e-5)))
    made.scheduler.check_accounting()


def test_refusals(engine, folders, tmp_path):
    made = folders[0]
    with pytest.raises(UserError, match=r"found 'ghost', expected one that is loaded \(none\)"):
        engine.unload_adapter("ghost")
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        engine.load_adapter("none", tmp_path)
    model, dora = decoder(), lora.LoraConfig(r=2, use_dora=True)
    lora.attach(model, dora)
    save_peft(model, tmp_path / "dora", dora)
    with pytest.raises(UserError, match="use_dora is true, which the slots of a server do not hold"):
        engine.load_adapter("dora", tmp_path / "dora")
    with pytest.raises(UserError, match="has rank 5, expected at most max_adapter_rank = 4"):
        engine.load_adapter("wide", made["wide"])
    engine.load_adapter("one", made["one"])
    with pytest.raises(UserError, match="'one' is loaded already"):
        engine.load_adapter("one", made["one"])
    engine.load_adapter("two", made["two"])
    with pytest.raises(UserError, match=r"all max_adapters = 2 slots are taken \(one, two\)"):
        engine.load_adapter("three", made["three"])
    for name in ("one", "two"):
        engine.unload_adapter(name)
    for field, value in (("max_adapters", -1), ("max_adapter_rank", 0)):
        with pytest.raises(UserError, match=f"{field}: found {value}"):
            EngineConfig(**{field: value})
