"""The scheduler with a pretended model: every sequence gets through, on exact pages, whatever the pressure."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.memory.pages import Owner
from jaxstack.engine.request import Request, SamplingParams, Sequence
from jaxstack.engine.scheduler import Scheduler, StepPlan
from jaxstack.engine.scheduling import FirstComeFirstServed

PAGE = 4


def make(order: int, prompt: list[int], max_tokens: int, n: int = 1) -> list[Sequence]:
    sampling = SamplingParams(max_tokens=max_tokens, n=n)
    request = Request(f"r{order}", tuple(prompt), sampling, 0.0, order, max_tokens, 0, unfinished=n)
    return [Sequence(request, i, list(prompt)) for i in range(n)]


def scheduler(pages: int, rows: int = 4, budget: int = 16, caching: bool = True) -> Scheduler:
    return Scheduler(
        FirstComeFirstServed(),
        num_pages=pages,
        page_size=PAGE,
        max_sequences=rows,
        max_batch_tokens=budget,
        prefix_caching=caching,
        clock=lambda: 0.0,
    )


def launch(s: Scheduler) -> StepPlan | None:
    """Plans and launches a step; None when a step in flight must settle first."""
    plan = s.plan()
    s.check_accounting()
    if plan is None:
        return None
    assert plan.tokens <= s.max_batch_tokens and len(plan.rows) <= s.max_sequences
    assert [r.count == 1 and r.samples for r in plan.rows] == [True] * plan.decodes + [False] * (
        len(plan.rows) - plan.decodes
    )
    written: set[tuple[int, int]] = set()
    for row in plan.rows:
        q = row.sequence
        assert q.finish_reason is None
        assert row.start == q.computed and row.samples == (row.start + row.count == q.length)
        for position in range(row.start, row.start + row.count):
            place = (q.pages[position // PAGE], position % PAGE)
            assert place not in written, "two rows write one cache slot"
            assert position // PAGE >= q.shared_pages, "a shared page is written"
            written.add(place)
    s.launched(plan)
    s.check_accounting()
    return plan


def settle(s: Scheduler, plan: StepPlan) -> list[Sequence]:
    """The end of a step of a model that always says 7; returns who finished."""
    s.settled(plan)
    s.check_accounting()
    done = []
    for row in plan.rows:
        if row.samples and row.sequence.finish_reason is None:
            q = row.sequence
            q.tokens.append(7)
            if q.generated >= q.request.max_tokens:
                end(s, q, "length")
                done.append(q)
    return done


def end(s: Scheduler, q: Sequence, reason: str) -> None:
    q.finish_reason = reason
    s.finish(q)
    q.request.unfinished -= 1
    s.check_accounting()


def turn(s: Scheduler) -> list[Sequence]:
    """One step without overlap."""
    plan = launch(s)
    assert plan is not None
    return settle(s, plan)


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=12
    ),
    st.integers(16, 40),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 30), max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_everything_finishes_and_every_page_is_accounted_for(requests, pages, caching, overlap, aborts):
    s = scheduler(pages, caching=caching)
    sequences = []
    for order, (family, length, max_tokens, n) in enumerate(requests):
        prompt = [family] * length  # families share prefixes
        sequences += make(order, prompt, max_tokens, n)
    for q in sequences:
        q.request.priority = q.request.order % 3
        s.add(q)
    in_flight: StepPlan | None = None
    writes: dict[int, int] = {}  # of the step in flight: page -> how many tokens
    for step in range(3000):
        open_ = [q for q in sequences if q.finish_reason is None]
        if step in aborts and open_:
            end(s, open_[-1], "abort")
        if not open_ and in_flight is None:
            break
        plan = launch(s)
        if plan is None:
            assert in_flight is not None
            settle(s, in_flight)
            in_flight, plan = None, launch(s)
            assert plan is not None
        if in_flight is not None:
            settle(s, in_flight)
        in_flight = plan if plan.rows else None
        if not plan.rows:
            s.settled(plan)  # a step of nothing
        if in_flight is not None and not overlap:
            settle(s, in_flight)
            in_flight = None
        writes = {}
        for row in in_flight.rows if in_flight else ():
            for position in range(row.start, row.start + row.count):
                page = row.sequence.pages[position // PAGE]
                writes[page] = writes.get(page, 0) + 1
        assert all(s.pool.owner(page) != Owner.FREE for page in writes)
    assert all(q.finish_reason for q in sequences) and not (s.waiting or s.running or s.closing)
    assert s.pool.private == 0
    s.tree.clear()
    assert s.pool.free == pages


def test_decode_rows_come_first_and_a_long_prompt_takes_what_is_left():
    s = scheduler(40, budget=8)
    for q in make(0, [1, 2, 3], 10):
        s.add(q)
    turn(s)
    for q in make(1, list(range(30)), 2):
        s.add(q)
    plan = s.plan()
    assert [(r.sequence.request.request_id, r.count) for r in plan.rows] == [("r0", 1), ("r1", 7)]


@pytest.mark.parametrize("caching", [True, False])
def test_choices_of_one_prompt_compute_it_once(caching):
    s = scheduler(40, rows=4, budget=64, caching=caching)
    for q in make(0, list(range(21)), 3, n=3):
        s.add(q)
    assert [r.count for r in s.plan().rows] == [21]
    s = scheduler(40, rows=4, budget=64, caching=caching)
    siblings = make(0, list(range(21)), 3, n=3)
    for q in siblings:
        s.add(q)
    turn(s)
    plan = s.plan()
    # The first decodes; the others take five shared pages and compute the last token of the prompt.
    assert sorted(r.count for r in plan.rows) == [1, 1, 1]
    assert siblings[1].pages[:5] == siblings[0].pages[:5]
    while s.running:
        turn(s)
    assert s.pool.free == 40 if not caching else s.pool.tree > 0


def test_lower_priorities_go_first_and_give_up_their_pages_last():
    s = scheduler(9, rows=3, budget=32)
    sequences = [make(order, [order] * 8, 12)[0] for order in range(3)]
    for q, priority in zip(sequences, (1, 0, 1)):
        q.request.priority = priority
        s.add(q)
    assert [r.sequence.order[0] for r in s.plan().rows] == [1, 0, 2]
    finished = []
    while s.running or s.waiting:
        finished += turn(s)
    assert [q.order[0] for q in finished] == [1, 0, 2] and s.counters.preemptions > 0


def test_preemption_gives_way_to_the_oldest():
    s = scheduler(8, rows=4, budget=32)
    first, second = make(0, [1] * 12, 18)[0], make(1, [2] * 8, 14)[0]
    s.add(first)
    s.add(second)
    finished = []
    while first in s.running or s.waiting or s.running:
        finished += turn(s)
    assert finished == [first, second]
    assert s.counters.preemptions > 0


def test_a_policy_decides_who_is_admitted():
    class Backwards(FirstComeFirstServed):
        def order(self, waiting, view):
            assert view.free_pages == 20 and view.cached_tokens(waiting[0]) == 0
            return sorted(waiting, key=lambda q: q.order, reverse=True)

    s = scheduler(20, rows=1)
    s.policy = Backwards()
    for order in range(3):
        s.add(make(order, [order] * 4, 1)[0])
    assert [r.sequence.request_id for r in s.plan().rows] == ["r2"]


@pytest.mark.parametrize("caching", [True, False])
def test_the_prefix_cache_counts_tokens(caching):
    s = scheduler(40, caching=caching)
    for order in range(2):
        s.add(make(order, list(range(10)), 1)[0])
        turn(s)
    assert s.counters.prefix_queries == 20
    assert s.counters.prefix_hits == (8 if caching else 0)
