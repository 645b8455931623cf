"""An engine with part of its cache on the host: the same tokens as with all of it on the device, within its bytes."""

import dataclasses
import functools
import random
import time

import jax
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.engine.errors import TransferFailed
from jaxstack.engine.layerwise import Layerwise
from jaxstack.engine.memory.swap import Rates, SwapConfig
from jaxstack.engine.swap_movers import EmulatedMachine
from jaxstack.engine.swap_start import cache_shape, start_swapping
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.decoder_config import MoeConfig
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.memory_spaces import Space, probe_spaces
from jaxstack.training.initialize import fresh_decoder

SETTINGS = {"max_sequences": 4, "max_batch_tokens": 16, "max_model_len": 96, "page_size": 4, "dtype": "float32"}


def model(layers=32, **changes) -> Decoder:
    config = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 128,
        "hidden_size": 32,
        "num_layers": layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
    }
    return fresh_decoder(DecoderConfig(**{**config, **changes}))


def swapping(share, pages, layers=32, swap=None, emulate=None, changes=None, **settings) -> Engine:
    """An engine whose cache may take the device's memory of `pages` pages."""
    config = SwapConfig(host_bytes=1 << 30, adaptive=False, host_share=share, **(swap or {}))
    settings = {**SETTINGS, **settings}
    engine = Engine(
        model(layers, **(changes or {})),
        None,
        EngineConfig(num_pages=pages, kv_swap=config, **settings),
        emulate=emulate,
    )
    engine.warm_up(progress=False)
    return engine


def requests(seed=0, count=10):
    """Mixed lengths; some begin alike."""
    rng = random.Random(seed)
    head = [rng.randrange(128) for _ in range(24)]
    prompts = [
        (head[: rng.choice([0, 9, 16, 24])] + [rng.randrange(128) for _ in range(rng.randrange(1, 40))])
        for _ in range(count)
    ]
    params = [
        SamplingParams(max_tokens=rng.randrange(4, 32), temperature=rng.choice([0.0, 0.8]), seed=i, ignore_eos=True)
        for i in range(count)
    ]
    return prompts, params


def answers(engine: Engine, seed=0, count=10):
    prompts, params = requests(seed, count)
    return [output.completions[0].token_ids for output in engine.generate(prompts, params)]


@functools.cache
def resident(layers=32, dtype="float32", seed=0, count=10, **changes):
    """The answers of an ordinary engine with room for all."""
    engine = Engine(model(layers, **dict(changes)), None, EngineConfig(num_pages=400, **{**SETTINGS, "dtype": dtype}))
    try:
        return answers(engine, seed, count)
    finally:
        engine.close()


def check(engine: Engine) -> None:
    """Within the budget, nothing compiled, everything accounted for; and with nothing running, nothing on the way."""
    engine._pipeline.settle()
    runner = engine.runner
    reading = engine.stats().swap
    assert reading.device_peak_bytes <= reading.device_budget_bytes
    assert engine.stats().recompilations == 0
    runner.spaces.check()
    engine.scheduler.check_accounting()
    assert sum(reading.pages.values()) == runner.spaces.size


@pytest.mark.parametrize("k, pages, group", [(0, 40, 1), (1, 40, 1), (8, 38, 1), (16, 44, 4), (31, 56, 1)])
def test_tokens_are_those_of_the_resident_engine(k, pages, group):
    """Mixed lengths, common beginnings, preemption; 32 layers, grouped queries."""
    engine = swapping(k / 32, pages, swap={"layers_per_program": group})
    assert answers(engine) == resident()
    check(engine)
    plan, stats = engine.runner.plan, engine.stats()
    assert plan.host_pages / plan.pages == pytest.approx(k / 32, abs=0.02)
    assert (stats.swap.bytes["to_device"] > 0) == (stats.swap.bytes["to_host"] > 0) == (k > 0)
    assert stats.prefix_hits > 0 and (stats.preemptions > 0) == (k < 8)  # room for more is room for more
    engine.close()


def test_bfloat16_and_windows():
    engine = swapping(0.5, 44, layers=4, dtype="bfloat16")
    assert answers(engine) == resident(4, "bfloat16")
    check(engine)
    everything = 2 * engine.stats().swap.bytes["to_device"]  # of twice as many bytes
    # Pages left of the window are not streamed.
    window = {"layer_windows": (12,) * 4}
    engine = swapping(0.5, 44, layers=4, changes=window)
    assert answers(engine) == resident(4, **window)
    check(engine)
    assert 0 < engine.stats().swap.bytes["to_device"] < everything / 2


def test_layers_in_groups_of_several_kinds():
    """One group of two layers, which differ: experts or none, a window or none."""
    moe = MoeConfig(num_experts=4, experts_per_token=2, intermediate_size=32, dense_layers=(0,))
    changes = {"architecture": "MixtralForCausalLM", "moe": moe, "layer_windows": (None, 12)}
    engine = swapping(0.5, 80, layers=2, swap={"layers_per_program": 2}, changes=changes)
    assert {kinds for _, kinds in engine.runner._groups} == {(False, True)}
    assert answers(engine) == resident(2, **changes)
    check(engine)
    reading, runner = engine.stats().swap, engine.runner
    slices = reading.bytes["to_device"] / runner._slice_bytes
    assert slices > 0 and runner._slice_bytes == 2 * runner.plan.chunk_pages * 4 * 4 * 16 * 4
    engine.close()


def test_steps_with_everything_on_the_device_are_one_program():
    """Before anything has left, and again once what is read is back in exchange for what is not."""
    engine = swapping(0.5, 64, layers=4)
    runner, kinds = engine.runner, []
    whole, groups = runner._run_whole, runner._run_groups
    runner._run_whole = lambda *given: kinds.append("whole") or whole(*given)
    runner._run_groups = lambda *given: kinds.append("groups") or groups(*given)
    assert answers(engine) == resident(4)
    assert kinds[0] == "whole" and "groups" in kinds
    prompts, _ = requests()
    began = []
    for prompt in prompts:  # each finds its beginning cached, on the device or the host
        kinds.clear()
        engine.generate([prompt], SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True))
        began.append(kinds[0])
        assert kinds[-8:].count("whole") >= 6, kinds  # others make room for pages to write
    assert "groups" in began
    check(engine)
    engine.close()


@pytest.mark.parametrize("emulate", [None, EmulatedMachine(lambda kv, new: 0.0, None, None)])
@pytest.mark.parametrize("at_once", [False, True])
def test_batches_that_fill_both_spaces_again_and_again(emulate, at_once):
    """What others have left behind is cached and in pieces: chunks are merged, or give pages back, so that all fit; and
    so they do where every page that leaves does so before the step.
    """
    engine = swapping(0.5, 44, layers=4, emulate=emulate)
    ordinary = Engine(model(4), None, EngineConfig(num_pages=400, **SETTINGS))
    runner, squeezed, returned = engine.runner, [], []
    moves, squeeze = runner._moves, runner.squeeze_now
    if at_once:
        room, store = moves._make_room, runner.store_now
        moves._make_room = lambda *given: ((leaving := room(*given)) and store(leaving)) or {}

    def noted(pair, merging, returning):
        (squeezed if returning is None else returned).append(pair)
        squeeze(pair, merging, returning)

    runner.squeeze_now = noted

    def compare(prompts, tokens):
        param = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        found, wanted = (
            [output.completions[0].token_ids for output in each.generate(prompts, param)] for each in (engine, ordinary)
        )
        assert found == wanted

    rng, earlier = random.Random(0), []
    for length in (50, 65, 66, 44):
        prompts = [[rng.randrange(128) for _ in range(length)] for _ in range(4)]
        compare(prompts, 1)
        compare(prompts, 96 - length)
        compare(earlier[-8:], 8)  # what is cached of them is right, too
        earlier += prompts
        assert len(runner.spaces.living_chunks()) <= runner.plan.chunks + runner.plan.new_chunks
    check(engine)
    assert squeezed and returned
    engine.close()
    runner.close()
    ordinary.close()


def test_a_host_that_launches_too_slowly_keeps_everything_on_the_device():
    """Where the device is not waited for, launching that takes longer than computing counts as a stall."""
    swap = SwapConfig(host_bytes=1 << 30, window_steps=4)
    config = EngineConfig(num_pages=44, kv_swap=swap, **SETTINGS)
    engine = Engine(model(4), None, config, rates=Rates(1e9, 5e8, 1e30))
    engine.warm_up(progress=False)
    runner = engine.runner
    runner._strict = False  # as on a GPU
    groups, decide = runner._run_groups, runner.controller.observe
    shares = []

    def slow(*given):
        time.sleep(0.04)
        return groups(*given)

    def noted(window):
        target = decide(window)
        shares.append((target.share, target.reason))
        return target

    runner._run_groups, runner.controller.observe = slow, noted
    for seed in range(2):
        assert answers(engine, seed) == resident(4, seed=seed)
    engine._pipeline.settle()
    largest = max(share for share, _ in shares)
    assert largest > 0 and shares[-1][0] == 0, shares
    assert engine.stats().swap.launch_s > 0.04
    engine.close()


@pytest.fixture(scope="module")
def small():
    """A live engine of 4 layers with half of its pages on the host, emulated, and slow enough that copies are under way
    when something happens.
    """
    machine = EmulatedMachine(lambda kv, new: 1e-4, 2e8, 2e8)
    engine = swapping(0.5, 44, layers=4, emulate=machine)
    yield engine
    engine.close()
    engine.runner.close()


def test_the_emulated_machine_gives_the_same_tokens(small):
    small.runner.change_link(2e7)
    assert answers(small) == resident(4)
    check(small)
    assert small.stats().swap.stall_s > 0
    small.runner.change_link(None)


def test_killing_requests_while_pages_move_leaks_nothing(small):
    rng, runner = random.Random(1), small.runner
    killed = 0
    while killed < 1000:
        prompts, params = requests(rng.randrange(1 << 30), 8)
        names = [small.submit(prompt, param) for prompt, param in zip(prompts, params)]
        for _ in range(rng.randrange(1, 6)):
            small.step()
        for name in names:
            small.abort(name)
        killed += len(names)
    while small.step():
        pass
    check(small)
    stats = small.stats()
    assert stats.running == stats.waiting == stats.pages_private == 0
    assert stats.swap.bytes["to_device"] > 0
    small.scheduler.tree.clear()
    for place in range(runner.swap.staging_segments):
        runner._free(place)
    runner._ring.rewind()
    for chunk in runner.spaces.dropped():
        runner._mover.drop(chunk)
    assert runner.spaces.on_host == runner.spaces.on_device == runner.spaces.chunks == 0
    runner._forget()
    assert runner.ledger.held("device") == {"pages": runner.cache_bytes}
    assert answers(small) == resident(4)  # and it serves as before


def test_aborts_change_nobody_elses_tokens(small):
    prompts, params = requests(3, 12)
    wanted = dict(enumerate(resident(4, seed=3, count=12)))
    names = [small.submit(prompt, param) for prompt, param in zip(prompts, params)]
    sequences = {}
    rng = random.Random(0)
    while small.step():
        sequences |= {s.request_id: s for s in small.scheduler.running}
        if rng.random() < 0.05:
            small.abort(rng.choice(names[::2]))
    for i, name in enumerate(names):
        got = sequences[name].tokens[len(prompts[i]) :] if name in sequences else []
        assert got == wanted[i][: len(got)] and (i % 2 == 0 or got == wanted[i])
    check(small)


def test_a_failed_copy_is_computed_anew_once_and_then_ends_the_request(small, monkeypatch):
    prompts, params = requests(4, 6)
    wanted = resident(4, seed=4, count=6)
    runner, failures = small.runner, []
    take = type(runner._mover).take

    def broken(self, place, chunks, *, wait):
        if chunks and failures:
            failures.pop()
            raise TransferFailed("the link is down")
        return take(self, place, chunks, wait=wait)

    monkeypatch.setattr(type(runner._mover), "take", broken)
    small.start(progress=False)
    try:
        failures.append(1)
        outputs = small.generate(prompts, params)
        assert not failures and [o.completions[0].token_ids for o in outputs] == wanted
        failures.extend([1, 1])
        outputs = small.generate(prompts, params)
        reasons = {o.completions[0].finish_reason for o in outputs}
        assert "error" in reasons and not failures
        outputs = small.generate(prompts, params)
        assert [o.completions[0].token_ids for o in outputs] == wanted
    finally:
        small._driver.stop(5.0)
        small._driver.stopping = False
    check(small)


def test_the_controller_grows_in_a_live_engine_and_refuses_a_slow_link():
    machine = EmulatedMachine(lambda kv, new: 1e-3, 2e8, 2e8)
    decoder = model(4)
    swap = SwapConfig(host_bytes=1 << 30, window_steps=4)
    config = EngineConfig(num_pages=44, kv_swap=swap, **SETTINGS)
    fast, slow = Rates(1e9, 5e8, 1e30), Rates(1e12, 1e6, 1e30)
    engine = Engine(decoder, None, config, emulate=machine, rates=fast)
    assert "predicted gain" in engine.notes[0] and "layers' worth hides" in engine.notes[0]
    for _ in range(5):  # a machine that is busy elsewhere stalls, and the controller rightly holds
        assert answers(engine) == resident(4)
        reading = engine.stats().swap
        if reading.decisions["grow"]:
            break
    assert reading.decisions["grow"] > 0 and reading.reason
    check(engine)
    engine.close()
    engine.runner.close()
    tight = dataclasses.replace(config, num_pages=80, kv_swap=dataclasses.replace(swap, layers_per_program=4))
    refused = Engine(model(4), None, tight, rates=fast)
    assert refused.notes[0].startswith("swapping off: ") and refused.notes[0].endswith(
        "segments of 4 layers take the rest"
    )
    assert refused.stats().swap is None
    refused = Engine(model(4), None, config, rates=slow)
    assert refused.notes[0].startswith("swapping off: the link moves 0.001 GB/s, a layer computes in")
    assert refused.stats().swap is None


def test_bad_settings_are_refused_in_a_line():
    decoder = model(4)
    config = EngineConfig(num_pages=44, **SETTINGS)
    plan = functools.partial(start_swapping, decoder, dtype=np.dtype("float32"))
    chosen = type("Sizes", (), {"num_pages": 44})()
    swap = SwapConfig(host_bytes=1 << 20, host_share=0.5)
    for changes, message in [
        ({"speculation": 3}, "swapping: found speculation = 3, expected 0"),
        ({"max_adapters": 1}, "swapping: found max_adapters = 1"),
        ({"batch_invariant": True}, "swapping: found batch_invariant = True"),
    ]:
        with pytest.raises(UserError, match=message):
            plan(config=dataclasses.replace(config, **changes), swap=swap, chosen=chosen)
    with pytest.raises(UserError, match=r"kv_host_gb: found 1000000.0 GB, expected at most the .* GB free"):
        plan(config=config, swap=dataclasses.replace(swap, host_bytes=10**15), chosen=chosen)
    with pytest.raises(UserError, match="layers_per_program: found 3, expected a divisor of the model's 4 layers"):
        plan(config=config, swap=dataclasses.replace(swap, layers_per_program=3), chosen=chosen)
    with pytest.raises(UserError, match="layers_per_program: found 0, expected an integer >= 1"):
        dataclasses.replace(swap, layers_per_program=0)
    with pytest.raises(UserError, match="host_bytes: found 1000, expected at least"):
        plan(config=config, swap=dataclasses.replace(swap, host_bytes=1000), chosen=chosen)
    chosen.num_pages = 10
    with pytest.raises(UserError, match=r"bytes of the device for keys and values, expected at least \d+"):
        plan(config=config, swap=swap, chosen=chosen)
    with pytest.raises(UserError, match="prompt: found"):
        engine = Engine(model(4), None, dataclasses.replace(config, kv_swap=swap))
        engine.submit([1] * 95, SamplingParams(max_tokens=40))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_moves_keep_their_memory_kinds_where_there_is_no_such_device(platform):
    spaces = probe_spaces()
    host = spaces.struct((2, 4, 4, 16), np.float32, Space.HOST)
    fetch = jax.jit(lambda x: jax.device_put(x, jax.memory.Space.Device) + 1)
    text = jax.export.export(fetch, platforms=[platform])(host).mlir_module()
    assert 'mhlo.memory_kind = "pinned_host"' in text and "annotate_device_placement" in text
    assert Layerwise.attention.__kwdefaults__["staged_pages"] is None


def test_an_abstract_model_asks_for_what_a_real_one_does():
    real = model(layers=2)
    assert cache_shape(Decoder.abstract(real.config), 4) == cache_shape(real, 4)
    assert cache_shape(real, 4).weight_bytes == sum(x.nbytes for x in jax.tree.leaves(nnx.state(real)))
