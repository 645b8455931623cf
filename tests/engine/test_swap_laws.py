"""The laws of swapping against event simulation, brute force and closed forms; the controller; the step simulator."""

import functools
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.memory.schedule import check
from jaxstack.engine.memory.swap import (
    CacheShape,
    ExpansionController,
    Rates,
    SegmentRing,
    SwapConfig,
    Window,
    capacity_tokens,
    gain,
    k_max,
    step_seconds,
)
from jaxstack.engine.memory.swap.capacity import hides, k_max_roofline
from jaxstack.engine.memory.swap.ring import streamed_layers, swap_schedule
from jaxstack.engine.memory.swap.sim import Job, SimEngine, simulate, workload
from jaxstack.engine.memory.swap.sizing import plan_spaces
from jaxstack.runtime.errors import UserError

LLAMA = CacheShape(layers=32, kv_bytes=4096, weight_bytes=16.1e9, parameters=8.03e9)
GH200 = Rates(device_bytes_per_s=3.6e12, link_bytes_per_s=4.19e11, flops_per_s=5e14)
M = 0.75e9
times = st.floats(0.05, 20.0)


def steady_step(schedule) -> float:
    """Seconds of a step once the start is forgotten: lanes are serial, in order, and a task waits for its needs."""
    end, free = {}, {}
    for task in schedule.tasks:
        begin = max([free.get(task.lane, 0.0), *(end[need] for need in task.needs)])
        end[task.id] = free[task.lane] = begin + task.seconds
    last = [end[t.id] for t in schedule.tasks if t.lane == "device" and t.id.layer == schedule.layers - 1]
    half = len(last) // 2
    return (last[-1] - last[half - 1]) / (len(last) - half)


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 12), share=st.floats(0, 1), staging=st.integers(1, 4), layer_s=times, moving_s=times)
def test_striped_pages_take_what_the_law_says(layers, share, staging, layer_s, moving_s):
    schedule = swap_schedule(layers, 24, layer_s, share * moving_s, staging=staging)
    check(schedule)
    law = step_seconds(layers, share * layers, layer_s, moving_s, staging=staging)
    if share == 0:  # nothing is streamed, and the law has no ring
        law = layers * max(layer_s, layer_s / staging)
    # The start takes a few steps; from then on every step is the law's, up to the shift that the half leaves.
    assert steady_step(schedule) == pytest.approx(law, rel=1e-9) or steady_step(
        swap_schedule(layers, 240, layer_s, share * moving_s, staging=staging)
    ) == pytest.approx(law, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(each=st.integers(1, 6), k=st.integers(1, 5), staging=st.integers(1, 3), layer_s=times, moving_s=times)
def test_static_layers_take_what_the_law_says(each, k, staging, layer_s, moving_s):
    layers = each * k
    schedule = swap_schedule(
        layers, 60, layer_s, moving_s, streamed=streamed_layers(layers, k), staging=min(staging, k * 60)
    )
    check(schedule)
    law = step_seconds(layers, k, layer_s, moving_s, placement="static_layers", staging=staging)
    assert steady_step(schedule) == pytest.approx(law, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(2, 12), slots=st.integers(1, 5), layer_s=times, moving_s=times)
def test_the_ring_moves_every_layer_both_ways(layers, slots, layer_s, moving_s):
    k = layers - min(slots, layers - 1)
    schedule = swap_schedule(layers, 60, layer_s, moving_s, staging=layers - k, write_back_s=moving_s)
    check(schedule)
    puts = sum(task.lane == "to_device" for task in schedule.tasks)
    assert puts == layers * 60  # not k a step
    law = step_seconds(layers, k, layer_s, moving_s, placement="ring")
    assert steady_step(schedule) == pytest.approx(law, rel=1e-9)


def loads_per_step(layers: int, slots: int, policy: str) -> float:
    """Of a cache of `slots` layers that are read in turn, each of which has to be there: loads in a long run."""
    held: list[int] = []
    loads, count = 0, 400 * layers
    for n in range(count):
        layer = n % layers
        if layer in held:
            if policy == "lru":
                held.remove(layer)
                held.append(layer)
            continue
        loads += n >= 40 * layers
        if len(held) == slots:
            held.remove(max(held, key=lambda x: (x - layer) % layers) if policy == "belady" else held[0])
        held.append(layer)
    return loads / 360


@functools.cache
def fewest(layers: int, slots: int, position: int, held: frozenset, left: int) -> int:
    """The fewest loads that any choice of victims comes to: exhaustive."""
    if left == 0:
        return 0
    layer, then = position % layers, (position + 1) % layers
    if layer in held:
        return fewest(layers, slots, then, held, left - 1)
    options = [held | {layer}] if len(held) < slots else [held - {out} | {layer} for out in held]
    return 1 + min(fewest(layers, slots, then, frozenset(option), left - 1) for option in options)


@pytest.mark.parametrize("layers, slots", [(n, s) for n in range(2, 9) for s in range(1, n)])
def test_loads_of_a_cyclic_scan(layers, slots):
    optimum = (layers - slots) * layers / (layers - 1)
    assert loads_per_step(layers, slots, "belady") == pytest.approx(optimum, rel=0.01)
    assert loads_per_step(layers, slots, "fifo") == loads_per_step(layers, slots, "lru") == layers
    assert len(streamed_layers(layers, layers - slots + 1)) == layers - slots + 1 >= optimum
    if layers <= 6:
        start, left = frozenset(range(slots)), 4 * layers
        assert fewest(layers, slots, 0, start, left) >= optimum * (left - slots) / layers - slots - 1
        assert fewest(layers, slots, 0, start, left) <= optimum * left / layers + 1


def test_capacity():
    base = capacity_tokens(LLAMA, M, 0.0)
    assert base == pytest.approx(M / 32 / 4096)
    for k, striped, static in [(8, 1.306, 1.231), (16, 1.882, 1.778)]:
        assert capacity_tokens(LLAMA, M, k / 32) / base == pytest.approx(striped, abs=5e-4)
        assert capacity_tokens(LLAMA, M, k / 32, placement="static_layers") / base == pytest.approx(static, abs=5e-4)
    assert gain(GH200, LLAMA, M, 8) == pytest.approx(1.289, abs=1e-3)
    assert gain(GH200, LLAMA, M, 16) == pytest.approx(1.811, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(4, 80),
    weights=st.floats(1e9, 2e11),
    kv=st.floats(1e8, 1e11),
    ratio=st.floats(0.001, 0.5),
    staging=st.integers(2, 3),
)
def test_the_closed_form_of_k_max(layers, weights, kv, ratio, staging):
    shape = CacheShape(layers, 4096, weights, weights / 2)
    rates = Rates(1e12, ratio * 1e12, 1e30)
    found = k_max(rates, shape, kv, staging=staging)
    closed = k_max_roofline(rates, shape, kv, staging=staging)
    assert found == pytest.approx(min(closed, layers) if closed > 0 else layers, rel=1e-6)
    if 1 <= found < layers - 1:
        tokens = [capacity_tokens(shape, kv, k / layers, staging=staging) for k in (found * 0.999, found * 1.001)]
        fits = [
            hides(layers, k, rates.layer_s(shape, x), rates.moving_s(shape, x), staging=staging)
            for k, x in zip((found * 0.999, found * 1.001), tokens)
        ]
        assert fits == [True, False]


def test_the_ring_hands_out_places_in_turn():
    ring = SegmentRing(layers=3, staging=2)
    assert [ring.issue(), ring.issue(), ring.may_issue] == [0, 1, False]
    with pytest.raises(AssertionError, match="no place"):
        ring.issue()
    assert (ring.run(), ring.may_issue, ring.issue(), ring.place(2), ring.layer(3)) == (0, True, 2, 0, 0)
    ring.rewind()
    assert ring.issued == ring.ran == 1
    with pytest.raises(AssertionError, match="without its segment"):
        ring.run()


def controller(link: float = 4.19e11, **changes) -> ExpansionController:
    capacity = functools.partial(capacity_tokens, LLAMA, M)
    return ExpansionController(
        SwapConfig(host_bytes=10**12, **changes),
        layers=32,
        kv_bytes=4096,
        capacity=capacity,
        device_tokens=lambda share: (1 - share) * capacity(share),
        link_bytes_per_s=link,
        device_bytes_per_s=GH200.device_bytes_per_s,
    )


def windows(found: ExpansionController, count: int, link: float, noise=0.0, waited=1.0, start=0):
    """Lets the controller run a full engine for `count` windows; its targets."""
    out = []
    for n in range(start, start + count):
        share = found.share
        tokens = capacity_tokens(LLAMA, M, share)
        rates = Rates(GH200.device_bytes_per_s, link * (1 + noise * math.sin(2.4 * n)), 5e14)
        layer_s, moving_s = rates.layer_s(LLAMA, tokens), rates.moving_s(LLAMA, tokens)
        step = step_seconds(32, share * 32, layer_s, moving_s)
        busy = 16 * 32 * share * moving_s
        window = Window(
            16 * 32 * layer_s, 16 * (step - 32 * layer_s), layer_s, tokens, waited, busy * rates.link_bytes_per_s, busy
        )
        out.append(found.observe(window))
    return out


@settings(max_examples=40, deadline=None)
@given(link=st.floats(5e9, 8e11), noise=st.floats(0, 0.15))
def test_the_controller_settles_and_does_not_swing(link, noise):
    found = controller()
    targets = windows(found, 150, link, noise)
    shares = [target.share for target in targets]
    for start in range(0, 100, 10):
        part = [b - a for a, b in itertools.pairwise(shares[start : start + 51]) if b != a]
        turns = sum(a * b < 0 for a, b in itertools.pairwise(part))
        assert turns <= 2, shares
    limit = k_max(Rates(3.6e12, link * (1 - noise), 5e14), LLAMA, M) / 32
    assert shares[-1] <= min(0.97, limit + 1 / 32 + 0.1 * noise)


def test_the_controller_reacts_to_a_slower_link_and_refuses_one_that_hides_nothing():
    found = controller()
    windows(found, 60, 4.19e11)
    before = found.share
    assert 22 / 32 < before < 26 / 32
    after = windows(found, 4, 1e11, start=60)
    assert after[0].decision == "shrink" and found.share < before - 0.15
    windows(found, 60, 1e11, start=64)
    assert 0.2 < found.share < 14 / 32
    slow = controller(1e9)
    assert {target.decision for target in windows(slow, 20, 1e9)} == {"refuse"} and slow.share == 0
    assert windows(controller(), 20, 4.19e11, waited=0.0)[-1].share == 0  # nobody waits for pages
    stuck = controller()
    windows(stuck, 60, 4.19e11)
    endless = [stuck.observe(Window(1.0, 0.5, 1e-4, 5e3, 1.0)) for _ in range(10)]
    assert endless[-1].share == 0 or endless[-1].urgent


def test_bad_settings_are_refused_by_name():
    for changes, message in [
        ({"host_share": 0.98}, "host_share: found 0.98, expected a number from 0 to 0.97"),
        ({"host_share": -0.1}, "host_share"),
        ({"staging_segments": 0}, "staging_segments"),
        ({"placement": "random"}, "placement"),
        ({"grow_below": 0.03}, "grow_below"),
        ({"margin": 0.0}, "margin"),
    ]:
        with pytest.raises(UserError, match=message):
            SwapConfig(host_bytes=1, **changes)
    with pytest.raises(UserError, match="layers: found 0"):
        CacheShape(0, 1, 1, 1)
    with pytest.raises(UserError, match="at least one slot"):
        capacity_tokens(LLAMA, M, 1.0, placement="ring")


@settings(max_examples=50, deadline=None)
@given(
    share=st.floats(0, 0.97),
    pages=st.integers(60, 4000),
    sequences=st.integers(1, 16),
    step_pages=st.integers(1, 8),
    chunk=st.integers(1, 64),
    group=st.sampled_from([1, 2, 4]),
)
def test_sizes_stay_within_the_budget_and_follow_the_law(share, pages, sequences, step_pages, chunk, group):
    swap = SwapConfig(host_bytes=1 << 50, chunk_pages=chunk)
    sizes = {"layers": 32, "page_bytes": 2048, "step_pages": step_pages, "sequences": sequences}
    sizes |= {"group": group}
    budget = pages * 32 * 2048
    try:
        plan = plan_spaces(swap, share, kv_device_bytes=budget, **sizes)
    except UserError as error:
        least = int(str(error).split("expected at least ")[1].split(":")[0])
        assert least > budget
        assert plan_spaces(swap, share, kv_device_bytes=least, **sizes).device_bytes == least
        return
    assert plan.device_bytes <= budget
    assert plan.host_pages == int(share / (1 - share) * plan.device_slots)
    assert plan.chunks * plan.chunk_pages >= plan.host_pages
    law = capacity_tokens(CacheShape(32, 128, 1, 1), budget, share, staging=2 * group) / 16
    # Padding to chunks, the scrap page, and what is on its way to the host.
    spare = 1 + 2 * group * (plan.new_chunks + 1) * plan.chunk_pages / 32
    assert law * (1 - spare / pages) - 3 / (1 - share) <= plan.pages <= law + 1


def test_the_simulator_keeps_count():
    jobs = workload(40, 0, per_second=200.0)
    assert all(4 <= job.prompt <= 512 and 4 <= job.output <= 768 for job in jobs)
    assert [job.arrival_s for job in jobs] == sorted(job.arrival_s for job in jobs)
    for share, admission in itertools.product((0.0, 0.5, None), ("preempt", "reserve")):
        engine = SimEngine(LLAMA, GH200, M, share=share, admission=admission)
        outcome = simulate(engine, jobs)
        assert len(outcome.latencies) == 40 and (not outcome.samples or outcome.samples[-1].output_tokens > 0)
        assert outcome.stall_share <= 0.02 and (admission == "preempt" or outcome.preemptions == 0)
    # One request alone: a step for each token, of which the first comes with the prompt.
    alone = simulate(SimEngine(LLAMA, GH200, M), [Job(1.0, 100, 20)])
    steps = [GH200.layer_s(LLAMA, 100, 100)] + [GH200.layer_s(LLAMA, 100 + n, 1) for n in range(1, 20)]
    assert alone.makespan_s == pytest.approx(1.0 + 32 * sum(steps))
    assert alone.latency == pytest.approx(32 * sum(steps) / 20)
    with pytest.raises(ValueError, match="a request needs"):
        simulate(SimEngine(LLAMA, GH200, 1e6), [Job(0.0, 500, 500)])
