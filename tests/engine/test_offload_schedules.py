"""Schedules of offloading: no data is touched too early or too late, and their periods are what the laws say."""

import dataclasses
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.memory import laws
from jaxstack.engine.memory.schedule import TO_DEVICE, Held, Schedule, ScheduleFault, Slot, Task, TaskId, check
from jaxstack.engine.memory.schedule_build import (
    BUILDERS,
    ScheduleShape,
    SlotBytes,
    TaskTimes,
    build_s1,
    build_s4_paged,
    build_s4_synced,
)
from jaxstack.engine.memory.schedule_sim import simulate
from jaxstack.runtime.errors import UserError

SIZES = SlotBytes(hidden=2, qkv=3, output=5, kv=7, new_kv=11, weights=120)

shapes = st.builds(
    ScheduleShape,
    layers=st.integers(1, 7),
    micro_batches=st.integers(1, 12),
    steps=st.integers(1, 4),
    look_ahead=st.integers(1, 14),
    pages=st.none() | st.integers(0, 30),
    drain=st.booleans(),
    buffer_share=st.sampled_from([0.01, 0.25, 0.5, 0.9, 1.0]),
)


def random_times(rng: random.Random) -> TaskTimes:
    """Every resource is the slowest one now and then."""
    return TaskTimes(*(rng.uniform(0.1, 3.0) * (8 if name == "weights" else 1) for name in TIME_NAMES))


TIME_NAMES = [field.name for field in dataclasses.fields(TaskTimes)]


@settings(max_examples=80, deadline=None)
@given(shape=shapes, name=st.sampled_from(sorted(BUILDERS)), seed=st.integers(0, 2**30))
def test_schedules_are_sound_and_run_in_every_dispatch(shape, name, seed):
    schedule = BUILDERS[name](shape, random_times(random.Random(seed)), SIZES)
    check(schedule)
    check(schedule, reordered=[TO_DEVICE])
    for dispatch in ("fixed", "paced", "eager"):
        timeline = simulate(schedule, dispatch)
        assert_runs_soundly(schedule, timeline)
    steps, layers, n = shape.steps, shape.layers, shape.micro_batches
    kinds = [task.id.kind for task in schedule.tasks]
    assert kinds.count("C") == kinds.count("A") == kinds.count("B") == steps * layers * n
    pages = {"S2": 1, "S3": 1, "S4": 1, "S4_synced": 1}.get(name, shape.pages_per_layer)
    assert kinds.count("W") == steps * layers * min(pages, shape.pages_per_layer)


def assert_runs_soundly(schedule, timeline):
    """By the clock, and not by the checker's reasoning: lanes are serial, needs are kept, contents are there."""
    lanes: dict = {}
    over: dict = {}
    for task, start, end in zip(schedule.tasks, timeline.starts, timeline.ends):
        lanes.setdefault(task.lane, []).append((start, end))
        over[task.id] = end
        assert end == start + task.seconds
    for task, start in zip(schedule.tasks, timeline.starts):
        assert all(over[need] <= start for need in task.needs)
    for spans in lanes.values():
        spans.sort()
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    there = {slot: (content, 0.0) for slot, content in schedule.initial}
    last_use: dict = {}
    order = sorted(range(len(schedule.tasks)), key=lambda place: (timeline.starts[place], place))
    for place in order:
        task, start, end = schedule.tasks[place], timeline.starts[place], timeline.ends[place]
        for slot, content in task.reads:
            assert there[slot][0] == content and there[slot][1] <= start
            last_use[slot] = max(last_use.get(slot, 0.0), end)
        for slot, content in task.writes:
            in_place = any(held.slot == slot for held in task.reads)
            assert in_place or last_use.get(slot, 0.0) <= start
            there[slot] = (content, end)
            last_use[slot] = max(last_use.get(slot, 0.0), end)


@pytest.mark.parametrize("name", ["S1", "S2", "S3", "S4", "S4_paged"])
@pytest.mark.parametrize(
    "shape",
    [
        ScheduleShape(3, 4, 2, look_ahead=2),
        ScheduleShape(2, 3, 2, look_ahead=3, pages=5, buffer_share=0.4),
        ScheduleShape(1, 2, 3, look_ahead=1, drain=True),
    ],
)
def test_every_dependency_is_needed(name, shape):
    """Without any one of them, something could be read too early or written over."""
    schedule = BUILDERS[name](shape, random_times(random.Random(0)), SIZES)
    dropped = 0
    for place, task in enumerate(schedule.tasks):
        for need in task.needs:
            without = dataclasses.replace(task, needs=tuple(other for other in task.needs if other != need))
            mutant = dataclasses.replace(
                schedule, tasks=(*schedule.tasks[:place], without, *schedule.tasks[place + 1 :])
            )
            with pytest.raises(ScheduleFault):
                check(mutant, reordered=[TO_DEVICE])
            dropped += 1
    assert dropped > 20


@pytest.mark.parametrize("name", ["S1", "S4"])
def test_every_free_and_write_is_needed(name):
    schedule = BUILDERS[name](ScheduleShape(3, 2, 2, look_ahead=2), random_times(random.Random(1)), SIZES)
    last_step = [task for task in schedule.tasks if task.id.step == 0 and task.id.layer == 0]
    for field in ("writes", "frees"):
        for task in last_step:
            if not getattr(task, field):
                continue
            place = schedule.tasks.index(task)
            mutant = dataclasses.replace(
                schedule,
                tasks=(*schedule.tasks[:place], dataclasses.replace(task, **{field: ()}), *schedule.tasks[place + 1 :]),
            )
            with pytest.raises(ScheduleFault):
                check(mutant)


def hand_made(*tasks: Task) -> Schedule:
    return Schedule("hand-made", tasks, {"x": Slot("device", 1), "y": Slot("host", 1)}, (Held("y", "seed"),))


@pytest.mark.parametrize(
    "tasks, told",
    [
        ([Task("a", "device", 1, needs=("b",)), Task("b", "host", 1)], "a needs b, which is not launched before it"),
        ([Task("a", "device", 1), Task("a", "host", 1)], "task a: found twice"),
        ([Task("a", "device", 1, reads=(Held("x", 1),))], "a reads 1 from slot x, which holds nothing"),
        ([Task("a", "device", 1, reads=(Held("y", 1),))], "a reads 1 from slot y, which holds seed"),
        ([Task("a", "device", 1, reads=(Held("z", 1),))], "names slot 'z'"),
        ([Task("a", "host", 1, frees=("x",))], "a frees slot x, which holds nothing"),
        (
            [Task("a", "host", 1, writes=(Held("x", 1),)), Task("b", "device", 1, reads=(Held("x", 1),))],
            "b reads 1 from slot x and does not wait for a",
        ),
        (
            [Task("a", "host", 1, reads=(Held("y", "seed"),)), Task("b", "device", 1, frees=("y",))],
            "b frees slot y and does not wait for a",
        ),
        ([Task("a", "host", 1, writes=(Held("y", 1),))], "a writes over seed in slot y, which nobody freed"),
        ([Task("a", "to_device", 1, paced_by="c")], "a is paced by c, which the schedule does not have"),
    ],
)
def test_faults_are_named(tasks, told):
    with pytest.raises(ScheduleFault, match=told):
        check(hand_made(*tasks))


def test_a_lane_that_reorders_gives_no_order():
    tasks = [Task("w", TO_DEVICE, 1, writes=(Held("x", 1),)), Task("r", TO_DEVICE, 1, reads=(Held("x", 1),))]
    check(hand_made(*tasks))
    with pytest.raises(ScheduleFault, match="does not wait for w"):
        check(hand_made(*tasks), reordered=[TO_DEVICE])


def test_tasks_that_wait_for_one_another_are_named():
    deadlock = hand_made(Task("a", "device", 1, needs=("c",)), Task("c", "device", 1))
    for dispatch in ("fixed", "paced"):
        with pytest.raises(ScheduleFault, match="a"):
            simulate(deadlock, dispatch)


# Periods.


@pytest.mark.parametrize("dispatch", ["fixed", "paced"])
def test_s1_attains_its_period_with_look_ahead_by_the_rule(dispatch):
    rng = random.Random(7)
    for _ in range(30):
        n, layers, times = rng.randint(1, 12), rng.randint(2, 7), random_times(rng)
        shape = ScheduleShape(layers, n, 12, look_ahead=laws.s1_look_ahead(times, n))
        period = simulate(build_s1(shape, times), dispatch).period
        assert period == pytest.approx(float(laws.s1_period(times, n)), rel=1e-9)


def test_s4_with_paged_weights_attains_its_period():
    rng = random.Random(11)
    for _ in range(30):
        n, times = rng.randint(1, 10), random_times(rng)
        times = dataclasses.replace(times, weights=times.weights * n / 8)
        period = simulate(build_s4_paged(ScheduleShape(rng.randint(4, 7), n, 8), times)).period
        assert period == pytest.approx(float(laws.s4_paged_period(times, n)), rel=1e-9)


def test_less_look_ahead_than_the_rule_says_is_slower_where_the_host_is():
    times = TaskTimes(before=0.2, attention=2.0, after=0.5, weights=4.0, qkv_to_host=0.5, output_to_device=0.3)
    n = 6
    assert laws.s1_look_ahead(times, n) == 2
    slow = TaskTimes(before=0.2, attention=2.0, after=1.7, weights=4.0, qkv_to_host=1.5, output_to_device=1.3)
    rule = laws.s1_look_ahead(slow, n)
    assert rule > 2
    law = float(laws.s1_period(slow, n))
    assert simulate(build_s1(ScheduleShape(5, n, 8, look_ahead=rule), slow)).period == pytest.approx(law)
    assert simulate(build_s1(ScheduleShape(5, n, 8, look_ahead=2), slow)).period > 1.02 * law


def test_eager_pages_are_slower_than_paced_ones_somewhere():
    rng = random.Random(3)
    worst = 1.0
    for _ in range(40):
        n, times = rng.randint(2, 12), random_times(rng)
        schedule = build_s1(ScheduleShape(4, n, 8, look_ahead=laws.s1_look_ahead(times, n)), times)
        worst = max(worst, simulate(schedule, "eager").period / simulate(schedule, "paced").period)
    assert worst > 1.05


def test_fewer_spare_pages_cost_at_least_what_the_law_says():
    rng = random.Random(5)
    for share in (0.25, 0.5, 0.75):
        for _ in range(10):
            n, times = 8, random_times(rng)
            shape = ScheduleShape(5, n, 8, look_ahead=laws.s1_look_ahead(times, n), buffer_share=share)
            law = float(laws.s1_period(times, n, buffer_share=share))
            assert law * (1 - 1e-9) <= simulate(build_s1(shape, times)).period <= 1.6 * law


def test_the_period_of_s4_with_barriers():
    rng = random.Random(9)
    for _ in range(30):
        n, times = rng.randint(1, 8), dataclasses.replace(random_times(rng), store_kv=0.01)
        times = dataclasses.replace(times, after=times.after + 0.02)  # a store is over before what follows B is
        period = simulate(build_s4_synced(ScheduleShape(4, n, 5), times)).period
        assert period == pytest.approx(float(laws.s4_synced_period(times, n)), rel=1e-9)


def test_the_steps_of_the_paper_drain_and_ours_do_not():
    times = TaskTimes(before=1, attention=3, after=2, weights=1, qkv_to_host=0.5, output_to_device=0.5)
    ours, drained = (
        simulate(build_s1(ScheduleShape(4, 6, 5, look_ahead=3, drain=drain), times)).period for drain in (False, True)
    )
    chain = 1 + 3 + 0.5 + 0.5
    assert 0 < (drained - ours) * 4 <= chain + 1e-9


# What a timeline says.


def test_idle_time_is_blamed_on_what_was_waited_for():
    times = TaskTimes(before=0.1, attention=0.1, after=0.8, weights=12.0, qkv_to_host=0.05, output_to_device=0.05)
    timeline = simulate(build_s1(ScheduleShape(4, 6, 5, look_ahead=2), times, SIZES))
    busy = timeline.busy(timeline.window)
    assert busy["to_device"] == pytest.approx(1.0)
    idle = timeline.idle("device", timeline.window)
    assert sum(idle.values()) + busy["device"] == pytest.approx(1.0)
    assert max(idle, key=lambda kind: idle[kind]) == "W"
    for lane in timeline.schedule.lanes:
        assert sum(timeline.idle(lane).values()) + timeline.busy()[lane] <= 1 + 1e-9


@pytest.mark.parametrize("dispatch", ["fixed", "paced", "eager"])
def test_peak_bytes_are_what_the_schedule_has_room_for(dispatch):
    shape = ScheduleShape(4, 6, 4, look_ahead=2)
    timeline = simulate(build_s1(shape, random_times(random.Random(0)), SIZES), dispatch)
    peak = timeline.peak_bytes()
    pages, hidden, staged = 2 * SIZES.weights, 6 * SIZES.hidden, 2 * (SIZES.qkv + SIZES.output)
    assert SIZES.weights + hidden < peak["device"] <= pages + hidden + staged
    assert 4 * 6 * SIZES.kv < peak["host"] <= 4 * 6 * SIZES.kv + staged


def test_half_the_spare_pages_take_half_the_bytes():
    times = random_times(random.Random(0))
    peaks = [
        simulate(build_s1(ScheduleShape(4, 8, 3, buffer_share=share), times, SlotBytes(weights=800))).peak_bytes()
        for share in (1.0, 0.5)
    ]
    assert [peak["device"] for peak in peaks] == [1600, 1200]


def test_bad_shapes_are_refused():
    with pytest.raises(UserError, match="micro_batches: found 0"):
        ScheduleShape(1, 0, 1)
    with pytest.raises(UserError, match=r"buffer_share: found 1\.5"):
        ScheduleShape(1, 1, 1, buffer_share=1.5)
    with pytest.raises(UserError, match="expected at least 3 for a period"):
        _ = simulate(build_s1(ScheduleShape(1, 1, 2), random_times(random.Random(0)))).period
    with pytest.raises(UserError, match="dispatch: found 'lazy'"):
        simulate(hand_made(), "lazy")  # type: ignore[arg-type]


def test_names_of_tasks_read_well():
    assert str(TaskId("C", 0, 3, 2)) == "C(0,3,2)"
