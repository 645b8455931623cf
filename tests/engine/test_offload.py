"""Models larger than their device: whatever is streamed, and wherever it is computed, tokens are those of the model
that is there as a whole, and the device never holds more than its budget.
"""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.engine.emulated_decode import emulate, resident_tokens
from jaxstack.engine.memory.offload_plan import Policy
from jaxstack.engine.memory.schedule import check
from jaxstack.engine.memory.schedule_build import TaskTimes
from jaxstack.engine.offload import OffloadConfig, host_experts, layouts_for, step_schedule, total_page_bytes
from jaxstack.engine.page_store import DEVICE
from jaxstack.models import DecoderConfig, MoeConfig, dense_attention
from jaxstack.runtime.compilation import CompileCounter
from jaxstack.runtime.errors import UserError
from jaxstack.training.initialize import fresh_decoder

SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
MIXTRAL = DecoderConfig(
    architecture="MixtralForCausalLM",
    num_layers=3,
    moe=MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=96),
    **SIZES,
)
QWEN3_MOE = DecoderConfig(  # plain MLPs among layers with experts
    architecture="Qwen3MoeForCausalLM",
    num_layers=3,
    qk_norm=True,
    moe=MoeConfig(num_experts=6, experts_per_token=2, intermediate_size=48, dense_layers=(0,)),
    **SIZES,
)
DBRX = DecoderConfig(
    architecture="DbrxForCausalLM",
    num_layers=2,
    norm="layer",
    qkv_clip=0.5,
    moe=MoeConfig(num_experts=16, experts_per_token=4, intermediate_size=96, weight_norm=1.0),
    **SIZES,
)
DENSE = DecoderConfig(
    architecture="Qwen2ForCausalLM", num_layers=3, qkv_bias=True, layer_windows=(None, 9, None), **SIZES
)

SETTINGS = EngineConfig(max_sequences=5, max_batch_tokens=16, page_size=4, num_pages=80)
GREEDY = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    stem = [rng.randrange(83) for _ in range(14)]
    return [[*stem, 1], [*stem, 2, 3], [5], [rng.randrange(83) for _ in range(23)], [7, 8, 9], stem[:9], [4, 4]]


def engine_of(config: DecoderConfig, offload: OffloadConfig | None, **changes) -> Engine:
    settings = dataclasses.replace(SETTINGS, offload=offload, **changes)
    engine = Engine(fresh_decoder(config), None, settings)
    engine.warm_up(progress=False)
    return engine


def answers(engine: Engine) -> list[list[int]]:
    compiled = CompileCounter()
    outputs = engine.generate(prompts(), GREEDY)
    assert compiled.count == engine.runner.recompilations == 0
    engine.scheduler.check_accounting()
    return [output.completions[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def plain():
    """(config, tokens) -> logits and final hidden states of a forward pass over everything, without any cache."""
    compiled: dict[str, tuple] = {}

    def of(config: DecoderConfig, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
        key = f"{config.architecture} {config.num_layers}"
        if key not in compiled:
            graph, state = nnx.split(fresh_decoder(config))

            @jax.jit
            def forward(state, tokens):
                decoder = nnx.merge(graph, state)
                hidden, _ = decoder.hidden(tokens, jnp.arange(64), dense_attention())
                return decoder.logits(hidden), hidden

            compiled[key] = forward, state
        forward, state = compiled[key]
        logits, hidden = forward(state, np.pad(np.array(tokens, np.int32), (0, 64 - len(tokens))))
        return np.asarray(logits)[: len(tokens)], np.asarray(hidden)[: len(tokens)]

    return of


def assert_greedy(plain, config: DecoderConfig, found: list[list[int]]) -> None:
    """Every token is the likeliest after those before it, where rounding does not decide."""
    compared = 0
    for prompt, answer in zip(prompts(), found):
        rows, _ = plain(config, prompt + answer[:-1])
        rows = rows[len(prompt) - 1 :]
        best = np.sort(rows, axis=-1)
        for row, token, margin in zip(rows, answer, best[:, -1] - best[:, -2]):
            if margin > 1e-4:
                assert token == row.argmax()
                compared += 1
    assert compared > 55


@pytest.fixture(scope="module")
def resident(plain):
    """The answers of an engine that has everything on the device."""
    policy = Policy(5, 1, attention_on_device=True, weight_resident=1.0, kv_resident=1.0)
    found = answers(engine_of(MIXTRAL, OffloadConfig(2**40, policy, fill=False)))
    assert_greedy(plain, MIXTRAL, found)
    return found


def offload(
    n: int, *, attention: bool, ffn: bool = True, weights: float = 0.0, kv: float = 0.0, **more
) -> OffloadConfig:
    policy = Policy(
        5, n, attention_on_device=attention, ffn_on_device=ffn, weight_resident=weights, kv_resident=kv, look_ahead=2
    )
    return OffloadConfig(more.pop("budget", 2**40), policy, fill=False, **more)


# What differs between them: micro-batches, where attention and feed-forward are computed, what stays, the schedule.
POLICIES = {
    "S1, all streamed, in 2": offload(2, attention=False),
    "S1, some stay, in 5": offload(5, attention=False, weights=0.3),
    "S1, all stay, in 1": offload(1, attention=False, weights=1.0),
    "S2, some stay, in 2": offload(2, attention=False, weights=0.3, schedule="S2"),
    "S3, all streamed, in 5": offload(5, attention=False, schedule="S3"),
    "S4, KV staged, in 2": offload(2, attention=True, schedule="S4"),
    "S4, KV staged, in 1": offload(1, attention=True, weights=0.3, schedule="S4"),
    "S4 synced, KV staged, in 5": offload(5, attention=True, schedule="S4_synced"),
    "S4 in pages, KV stays, in 5": offload(5, attention=True, kv=1.0, weights=0.3),
    "S4 in pages, KV stays, in 1": offload(1, attention=True, kv=1.0),
    "experts on the host, in 2": offload(2, attention=False, ffn=False),
    "only experts on the host, in 5": offload(5, attention=True, ffn=False, kv=1.0),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_gives_the_resident_tokens(name, resident):
    engine = engine_of(MIXTRAL, POLICIES[name])
    assert answers(engine) == resident
    ledger = engine.runner.ledger
    live = ledger.live(DEVICE)
    assert answers(engine) == resident  # with a cached prefix
    assert ledger.live(DEVICE) == live


@pytest.mark.parametrize("config", [QWEN3_MOE, DBRX, DENSE], ids=lambda c: c.architecture)
def test_other_families(config, plain):
    assert_greedy(plain, config, answers(engine_of(config, offload(2, attention=False, weights=0.3, pages=4))))


DEEP = dataclasses.replace(
    MIXTRAL,
    num_layers=16,
    layer_windows=(),
    intermediate_size=192,
    moe=MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=192),
)


@pytest.fixture(scope="module")
def small():
    """An engine whose budget is a quarter of its model's weights."""
    budget = 2_350_000
    whole = total_page_bytes(DEEP, layouts_for(DEEP, offload(2, attention=False)), jnp.dtype(jnp.float32))
    assert whole > 4 * budget
    settings = dataclasses.replace(offload(2, attention=False, budget=budget), fill=True)
    return engine_of(DEEP, settings)


def test_weights_four_times_the_budget(small, plain):
    assert_greedy(plain, DEEP, answers(small))
    ledger = small.runner.ledger
    assert ledger.live(DEVICE) < ledger.peak(DEVICE) <= ledger.budget(DEVICE) == 2_350_000
    held = ledger.held(DEVICE)
    assert held["pages passing through"] > 0 and held["weights that are no pages"] > 0


def test_scores_and_embeddings_pass_through_the_pieces(small, plain):
    scored = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    for prompt, output in zip(prompts()[:4], small.generate(prompts()[:4], scored)):
        logits, _ = plain(DEEP, prompt)
        expected = jax.nn.log_softmax(logits)[np.arange(len(prompt) - 1), prompt[1:]]
        found = [score.logprob for score in output.prompt_logprobs[1:]]
        np.testing.assert_allclose(found, expected, atol=2e-3)
    for prompt, vector in zip(prompts()[:3], small.embed(prompts()[:3])):
        np.testing.assert_allclose(vector, plain(DEEP, prompt)[1][-1], atol=2e-3)


def test_a_copy_that_fails_ends_its_step_and_nothing_else(small, monkeypatch):
    expected = answers(small)
    ledger, store = small.runner.ledger, small.runner.store
    live = ledger.live(DEVICE)
    real, calls = store.bring, []

    def bring(layer, transfer, seconds):
        calls.append(layer)
        if len(calls) == 70:
            raise RuntimeError("the copy failed")
        real(layer, transfer, seconds)

    monkeypatch.setattr(store, "bring", bring)
    small.start(progress=False)
    try:
        outputs = [None] * 2
        failed = small.generate([prompts()[0]], GREEDY)[0].completions[0]
        assert failed.finish_reason == "error"
        outputs = small.generate(prompts(), GREEDY)
        assert [o.completions[0].token_ids for o in outputs] == expected
    finally:
        small._driver.stop(0.0)
        small._driver.stopping = False
    assert ledger.live(DEVICE) == live
    assert ledger.peak(DEVICE) <= ledger.budget(DEVICE)


def test_an_aborted_request_leaves_no_bytes_behind(small):
    ledger, live = small.runner.ledger, small.runner.ledger.live(DEVICE)
    name = small.submit(prompts()[3], dataclasses.replace(GREEDY, max_tokens=30))
    for _ in range(4):
        small.step()
    small.abort(name)
    while small.step():
        pass
    assert ledger.live(DEVICE) == live
    assert small.scheduler.pool.private == 0


def test_a_budget_below_the_floor_is_refused_with_its_largest_term():
    with pytest.raises(UserError, match=r"device budget: found 0.0005 GB, expected at least .* GB are two layers of"):
        engine_of(DEEP, offload(2, attention=False, budget=500_000))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"speculation": 2}, "offload: found speculation besides"),
        ({"max_adapters": 1, "batch_invariant": True}, "offload: found max_adapters and batch_invariant besides"),
    ],
)
def test_what_cannot_be_combined_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SETTINGS, offload=offload(2, attention=False), **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "S5"}, "schedule: found 'S5', expected one of S1"),
        ({"schedule": "S4"}, "schedule: found S4 with attention on the host"),
        ({"budget": 0}, "device_budget_bytes: found 0"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(UserError, match=message):
        offload(2, attention=False, **changes)
    with pytest.raises(UserError, match="kv_resident: found 1"):
        offload(2, attention=False, kv=1.0)


def test_the_weights_of_an_engine_that_streams_them_are_not_exchanged(small):
    with pytest.raises(UserError, match="keeps weights on the host"):
        small.update_weights(fresh_decoder(DEEP, seed=1))


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_schedules_of_a_step_are_proved(layers, n):
    for settings in POLICIES.values():
        for transfers in (0, 1) if settings.one_piece else (0, 1, 3, 8):
            check(step_schedule(settings, layers=layers, micro_batches=n, transfers=transfers))
    for attention in (False, True):
        check(host_experts(layers, n, attention_on_device=attention))


def test_emulated_schedules_draw_the_resident_tokens():
    """Lanes that are threads, at a hundredth of the time that the study takes."""
    expected = resident_tokens(steps=3, micro_batches=3)
    times = TaskTimes(1e-4, 2e-4, 5e-4, 2e-3, 1e-4, 1e-4, 1e-4, 1e-4)
    for name in ("S1", "S2", "S4"):
        run = emulate(name, times, steps=3, micro_batches=3, pages=8)
        np.testing.assert_array_equal(run.tokens, expected, err_msg=name)
        assert run.timeline.period > 0 and run.usage["to_device"].moved_bytes > 0
