"""Policies in the real scheduler under a virtual clock: who is served, how evenly, and that nobody waits for ever."""

import logging
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.request import Request, SamplingParams, Sequence
from jaxstack.engine.scheduler import Scheduler
from jaxstack.engine.scheduling import (
    DeficitLedger,
    DeficitLongestPrefixMatch,
    FirstComeFirstServed,
    LongestPrefixMatch,
    ServiceCost,
    VirtualTokenCounter,
    policy_named,
)
from jaxstack.runtime.errors import UserError

PAGE = 4


class Replica:
    """A scheduler whose model says 7 and takes 2 ms a step and 25 us a token. It keeps its own count of the service.
    With overlap a step is planned before the tokens of the one before are known.
    """

    def __init__(self, policy, *, pages=200, page=PAGE, rows=4, budget=32, reserve=False, overlap=False):
        self.now_s, self._order, self._overlap, self._in_flight = 0.0, 0, overlap, None
        self.s = Scheduler(
            policy,
            num_pages=pages,
            page_size=page,
            max_sequences=rows,
            max_batch_tokens=budget,
            reserve=reserve,
            clock=lambda: self.now_s,
        )
        self.service: dict[str, int] = {}
        self.started: list[Sequence] = []
        self.finished: list[Sequence] = []

    def ask(self, client, prompt, max_tokens, n=1, priority=0):
        sampling = SamplingParams(max_tokens=max_tokens, n=n)
        request = Request(
            f"r{self._order}", tuple(prompt), sampling, self.now_s, self._order, max_tokens, 0, client=client
        )
        request.unfinished, request.priority = n, priority
        self._order += 1
        sequences = [Sequence(request, i, list(prompt)) for i in range(n)]
        for q in sequences:
            self.service.setdefault(client, 0)
            self.s.add(q)
        return sequences[0]

    def end(self, q, reason):
        q.finish_reason = reason
        if reason == "abort" and q.slot >= 0 and q.computed < len(q.request.prompt):
            self.service[q.client] -= len(q.request.prompt) - q.computed
        self.s.finish(q)
        q.request.unfinished -= 1
        self.finished.append(q)

    def step(self):
        before = {q: q.request.cached_tokens for q in self.s.waiting}
        plan = self.s.plan()
        if plan is None:
            self.settle()
            plan = self.s.plan()
        for q in self.s.running:
            if q in before:
                self.started.append(q)
                if before[q] is None and q.index == 0:
                    self.service[q.client] += len(q.request.prompt) - q.request.cached_tokens
        self.now_s += 0.002 + 25e-6 * plan.tokens
        self.s.launched(plan)
        self.settle()
        self._in_flight = plan
        if not self._overlap:
            self.settle()
        return plan

    def settle(self):
        plan, self._in_flight = self._in_flight, None
        if plan is None:
            return
        self.s.settled(plan)
        for row in plan.rows:
            q = row.sequence
            if row.samples and q.finish_reason is None:
                q.tokens.append(7)
                self.service[q.client] += 2
                if q.generated >= q.request.max_tokens:
                    self.end(q, "length")

    def steps(self, limit=10_000):
        """Steps until there is nothing left to do."""
        for _ in range(limit):
            if not (self.s.waiting or self.s.running):
                self.settle()
                return
            self.step()
        raise AssertionError("somebody waits for ever")

    @property
    def names(self):
        return [q.request_id for q in self.started]

    @property
    def certificate(self):
        return self.s.steward.certificate


def fresh(rng, length):
    return [rng.randrange(1_000_000) for _ in range(length)]


# Everything at once.

_arrival = st.tuples(
    st.integers(0, 40),  # the step
    st.sampled_from("abc"),
    st.integers(0, 2),  # which of the client's prefixes
    st.integers(1, 30),  # its length
    st.integers(1, 9),  # tokens of its own
    st.integers(1, 12),  # output
)


@given(
    st.sampled_from(["dlpm", "dlpm", "vtc", "lpm", "fcfs"]),
    st.lists(_arrival, min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 39)), max_size=6),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 3)),
    st.sampled_from([5, 30, 200]),
    st.integers(20, 60),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_accounts_are_exact_debts_bounded_and_all_are_served(
    name, arrivals, aborts, weights, quantum, pages, reserve, overlap, rng
):
    options = {"quantum": quantum, "max_overtakes": 5} if name == "dlpm" else {}
    policy = policy_named(name, weights=weights, **options)
    replica = Replica(policy, pages=pages, reserve=reserve, overlap=overlap)
    asked: list[Sequence] = []
    by_step: dict[int, list] = {}
    for arrival in arrivals:
        by_step.setdefault(arrival[0], []).append(arrival)
    for step in range(4000):
        for _, client, prefix, length, own, output in by_step.pop(step, ()):
            asked.append(replica.ask(client, [ord(client), prefix] * length + fresh(rng, own), output))
        for at, which in aborts:
            if at == step and which < len(asked) and asked[which].finish_reason is None:
                replica.end(asked[which], "abort")
        if not by_step and not replica.s.waiting and not replica.s.running:
            break
        waiting = list(replica.s.waiting)
        lengths = [replica.s.cached_tokens(q) for q in waiting]
        assert replica.s.prefix_lengths(waiting) == lengths
        rng.shuffle(replica.s.waiting)  # nothing may depend on it
        replica.step()
        replica.s.check_accounting()
        check_fairness(replica, policy, weights, quantum)
    assert all(q.finish_reason for q in asked) and len(asked) == len(arrivals)
    assert replica.s.steward.errors == 0 and not replica.s.waiting_clients
    if not aborts:
        accounts = replica.s.steward.accounts.all()
        assert {client: account.service for client, account in accounts.items()} == replica.service
        assert sum(account.starts for account in accounts.values()) == len(asked)


def check_fairness(replica, policy, weights, quantum):
    steward = replica.s.steward
    if policy.name in ("fcfs", "lpm"):
        assert replica.certificate.bound is None
        return
    if policy.name == "dlpm":
        debt = steward._longest_prompt + 2 * steward._output_tokens
        for client, deficit in policy.deficits().items():
            assert -debt < deficit <= quantum * weights.get(client, 1)
    if replica.certificate.bound is not None:
        assert replica.certificate.max_gap <= replica.certificate.bound


@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize("name", ["dlpm", "vtc"])
def test_what_a_ledger_is_charged_is_what_clients_got(name, reserve):
    rng = random.Random(3)
    policy = policy_named(name, weights={"b": 2})
    charged: dict[str, int] = {}
    target = policy.ledger if name == "dlpm" else policy
    method = "charge" if name == "dlpm" else "_charge"
    plain = getattr(target, method)

    def counting(client, service):
        charged[client] = charged.get(client, 0) + service
        plain(client, service)

    setattr(target, method, counting)
    replica = Replica(policy, pages=24, rows=4, reserve=reserve)
    for i in range(60):
        client = rng.choice("abc")
        replica.ask(client, [ord(client)] * rng.randrange(1, 20) + fresh(rng, 3), rng.randrange(1, 20), n=1 + i % 2)
    replica.steps()
    assert charged == replica.service == {c: a.service for c, a in replica.s.steward.accounts.all().items()}
    assert (replica.s.counters.preemptions > 0) == (not reserve)
    assert (replica.s.counters.recomputed_tokens > 0) == (not reserve)


def closed_loop(policy, demands, *, steps, until=None, **settings):
    """Each client keeps so many requests waiting: `demands` has, by client, how many and a function that makes one.

    Returns the replica. Asserts that nobody who waits goes without service for longer than the others may be ahead.
    """
    replica = Replica(policy, **settings)
    without = dict.fromkeys(demands, 0)
    for _ in range(steps):
        for client, (backlog, make) in demands.items():
            while replica.s.waiting_clients.get(client, 0) < backlog:
                replica.ask(client, *make())
        before = dict(replica.service)
        replica.step()
        bound = replica.certificate.bound
        given = {client: replica.service[client] - before[client] for client in demands}
        for client in demands:
            without[client] = 0 if given[client] else without[client] + sum(given.values())
            if bound is not None:
                weights = sum(policy.weights.get(other, 1) for other in demands if other != client)
                assert without[client] <= weights * bound
                assert replica.certificate.max_gap <= bound
        if until is not None and sum(replica.service.values()) >= until:
            break
    return replica


def documents(rng, name, count, length, output=(4, 12)):
    """A maker of requests: one of `count` documents, and a few tokens of its own."""
    texts = [[zlib.crc32(f"{name} {i}".encode())] * length for i in range(count)]
    return lambda: (rng.choice(texts) + fresh(rng, rng.randrange(4, 12)), rng.randrange(*output))


# Fair and local.


def test_shares_follow_weights_and_floods_do_not_matter():
    rng = random.Random(0)
    demands = {
        "light": (10, documents(rng, "l", 2, 64)),
        "heavy": (10, documents(rng, "h", 2, 64)),
        "flood": (60, documents(rng, "f", 1, 16)),
    }
    policy = DeficitLongestPrefixMatch(quantum=200, weights={"heavy": 3})
    replica = closed_loop(policy, demands, steps=2500, pages=120, rows=8, budget=64)
    per_weight = [replica.service[c] / w for c, w in (("light", 1), ("heavy", 3), ("flood", 1))]
    assert max(per_weight) - min(per_weight) <= replica.certificate.bound < min(per_weight) / 2
    assert 0 < replica.certificate.gap_over_bound <= 1


@pytest.mark.parametrize("name", ["dlpm", "vtc"])
def test_ten_times_the_requests_give_no_more_service(name):
    got, bounds = [], []
    for backlog in (4, 40):
        rng = random.Random(5)
        demands = {"f": (4, documents(rng, "f", 2, 40)), "g": (backlog, documents(rng, "g", 2, 40))}
        policy = policy_named(name, **({"quantum": 150} if name == "dlpm" else {}))
        replica = closed_loop(policy, demands, steps=5000, until=20_000, pages=80, rows=6, budget=64)
        got.append(replica.service["f"])
        bounds.append(replica.certificate.bound)
    assert abs(got[0] - got[1]) <= max(bounds)


def hit_rate(policy):
    rng = random.Random(7)
    demands = {name: (6, documents(rng, name, 2, 96)) for name in "abcdef"}
    replica = closed_loop(policy, demands, steps=1200, pages=100, rows=6, budget=64)
    return replica.s.counters.prefix_hits / replica.s.counters.prefix_queries, replica


def test_deficits_keep_most_of_the_locality_that_counters_lose():
    local, _ = hit_rate(LongestPrefixMatch())
    fair, replica = hit_rate(DeficitLongestPrefixMatch(quantum=400))
    counters, other = hit_rate(VirtualTokenCounter())
    assert counters + 0.2 < fair <= local + 0.02
    assert replica.certificate.gap_over_bound < 1 and other.certificate.gap_over_bound < 1


# Debts: who comes in waves pays, once.


def waves(policy, seconds):
    """g sends waves of long answers, each when the last has ended; f always has 40 short ones waiting. Those of g
    have a cached prefix, so that they go first when both have credit.

    Returns: the most that g got ahead of f over any interval, and f ahead of g, and the bound. The bound holds for what
    g may get ahead. It falls behind while it has nothing to ask for, by less than the bound in ten seconds.
    """
    rng = random.Random(0)
    replica = Replica(policy, pages=1024, page=16, rows=16, budget=512)
    lowest = highest = gained = lost = 0
    while replica.now_s < seconds:
        while replica.s.waiting_clients.get("f", 0) < 40:
            replica.ask("f", fresh(rng, 240), 16)
        account = replica.s.steward.accounts.all().get("g")
        if account is None or not account.open:
            for _ in range(15):
                replica.ask("g", [1] * 48 + fresh(rng, 16), 400)
        replica.step()
        ahead = replica.service["g"] - replica.service["f"]
        lowest, highest = min(lowest, ahead), max(highest, ahead)
        gained, lost = max(gained, ahead - lowest), max(lost, highest - ahead)
    return gained, lost, policy.bound(240, replica.s.steward._output_tokens)


def test_a_client_that_comes_in_waves_gets_neither_more_nor_less():
    gained, _, bound = waves(DeficitLongestPrefixMatch(quantum=512), 40.0)
    assert gained <= bound
    _, lost, bound = waves(DeficitLongestPrefixMatch(quantum=512), 10.0)
    assert lost <= bound


def test_the_waves_would_tell_if_debts_were_wiped_on_return(monkeypatch):
    def forget(ledger, key):
        ledger._deficits.pop(key, None)
        ledger._debtors.pop(key, None)

    monkeypatch.setattr(DeficitLedger, "idle", forget)
    gained, _, bound = waves(DeficitLongestPrefixMatch(quantum=512), 40.0)
    assert gained > bound


def test_the_waves_would_tell_if_only_those_who_wait_were_refilled(monkeypatch):
    def partly(ledger, keys):
        rounds = min(-ledger.deficit(key) // ledger.quantum + 1 for key in keys)
        ledger.refill_debtors(rounds, among=keys)
        return rounds

    monkeypatch.setattr(DeficitLedger, "refill_until_credit", partly)
    _, lost, bound = waves(DeficitLongestPrefixMatch(quantum=512), 10.0)
    assert lost > bound


# Order.


def replay(policy, seed, clients="abc", shuffle=False, **settings):
    rng, mixer = random.Random(seed), random.Random(seed + 1)
    replica = Replica(policy, **{"pages": 400, **settings})
    for name in clients:  # all are known before the first refill
        replica.ask(name, fresh(rng, 5), 3)
    for _ in range(120):
        for _ in range(rng.randrange(3)):
            client = rng.choice(clients)
            make = documents(rng, (client, rng.randrange(2)), 1, rng.choice([8, 24]))
            replica.ask(client, *make())
        if shuffle:
            mixer.shuffle(replica.s.waiting)
        replica.step()
    replica.steps()
    return replica.names


@pytest.mark.parametrize("seed", range(4))
def test_with_one_client_or_endless_credit_the_order_is_that_of_the_longest_prefix(seed):
    alone = DeficitLongestPrefixMatch(quantum=50, max_overtakes=None)
    assert replay(alone, seed, "a") == replay(LongestPrefixMatch(), seed, "a")
    endless = DeficitLongestPrefixMatch(quantum=10**9, max_overtakes=None)
    assert replay(endless, seed) == replay(LongestPrefixMatch(), seed)


@pytest.mark.parametrize("name", ["fcfs", "lpm", "vtc", "dlpm"])
def test_the_order_does_not_depend_on_that_of_lists_and_dicts(name):
    plain = replay(policy_named(name, weights={"a": 2, "b": 3}), 1)
    assert plain == replay(policy_named(name, weights={"b": 3, "a": 2}), 1, shuffle=True)
    assert plain != sorted(plain, key=lambda n: int(n[1:])) or name == "fcfs"


def test_of_those_that_share_an_uncached_prefix_one_goes_first():
    for name in ("lpm", "vtc", "dlpm"):
        replica = Replica(policy_named(name), rows=8, budget=64)
        for i in range(3):
            replica.ask("a", [1] * 16 + [100 + i], 2)
        other = replica.ask("a" if name == "vtc" else "b", [2] * 16, 2)
        replica.step()
        assert replica.started[0].request_id == "r0" and other in replica.started and len(replica.started) == 2
        replica.step()
        assert [q.request.cached_tokens for q in replica.started[2:]] == [16, 16]


def test_a_client_that_comes_back_has_saved_up_nothing():
    policy = VirtualTokenCounter(weights={"a": 2})
    replica = Replica(policy, rows=1)
    for _ in range(6):
        replica.ask("a", [1] * 10, 5)
        replica.ask("b", [2] * 10, 5)
    for _ in range(12):
        replica.step()
    counters = policy.counters()
    assert set(replica.s.waiting_clients) == {"a", "b"} and min(counters.values()) > 0
    replica.ask("c", [3] * 10, 5)  # was never here
    assert policy.counters() == {**counters, "c": min(counters.values())}
    assert policy.deficits()["c"] == max(policy.deficits().values())
    replica.ask("c", [3] * 10, 5)
    assert policy.counters()["c"] == min(counters.values())
    copy = VirtualTokenCounter(weights={"a": 2})
    copy.restore(policy.snapshot())
    assert copy.counters() == policy.counters()


# Overtaking.


def test_a_cold_request_is_overtaken_so_often_and_no_more():
    rng = random.Random(2)
    for limit, expected in ((7, 7), (None, 40)):
        replica = Replica(DeficitLongestPrefixMatch(quantum=10**6, max_overtakes=limit), rows=1, budget=128)
        hot = [5] * 40
        replica.ask("a", [*hot, 1], 1)
        replica.steps()
        cold = replica.ask("a", fresh(rng, 12), 1)
        for _ in range(40):
            while replica.s.waiting_clients.get("a", 0) < 4:
                replica.ask("a", hot + fresh(rng, 2), 1)
            replica.step()
        overtakers = [q for q in replica.started if q.order > cold.order]
        if cold in replica.started:
            overtakers = [q for q in replica.started[: replica.started.index(cold)] if q.order > cold.order]
        assert (cold in replica.started) == (limit is not None) and len(overtakers) == expected


def test_a_large_request_gets_memory_in_the_end():
    replica = Replica(DeficitLongestPrefixMatch(quantum=10**6, max_overtakes=5), pages=20, rows=8, budget=128)
    rng = random.Random(4)
    for _ in range(3):
        replica.ask("a", fresh(rng, 8), 12)
    replica.step()
    large = replica.ask("a", fresh(rng, 70), 1)
    for _ in range(60):
        while replica.s.waiting_clients.get("a", 0) < 4:
            replica.ask("a", fresh(rng, 8), 12)
        replica.step()
    place = replica.started.index(large)
    assert 5 <= sum(q.order > large.order for q in replica.started[:place]) <= 8


def test_room_that_only_debtors_could_use_is_counted():
    policy = DeficitLongestPrefixMatch(quantum=10)
    replica = Replica(policy, pages=20, rows=8, budget=128)
    replica.ask("a", [1] * 40, 30)
    replica.step()  # in debt now, and half of the pages are taken
    replica.ask("b", [2] * 60, 2)
    replica.ask("a", [3] * 4, 2)
    replica.step()
    assert policy.ledger.deficit("a") < 0 < policy.ledger.deficit("b") and policy.blocked_steps == 1
    assert len(replica.started) == 1
    replica.steps()


# What may go wrong.


def test_what_can_never_fit_is_refused_on_arrival():
    replica = Replica(DeficitLongestPrefixMatch(quantum=10), pages=4)
    with pytest.raises(UserError, match=r"found 10 tokens and max_tokens = 8, which need 5 pages, expected at most"):
        replica.ask("a", [1] * 10, 8)
    replica.ask("a", [1] * 10, 7)
    replica.steps()


@pytest.mark.parametrize("reserve", [False, True])
def test_an_abort_pays_for_what_ran(reserve):
    policy = DeficitLongestPrefixMatch(quantum=1000)
    replica = Replica(policy, budget=16, reserve=reserve)
    q = replica.ask("a", list(range(100)), 5)
    replica.step()
    replica.step()
    assert policy.ledger.deficit("a") == 900
    replica.end(q, "abort")
    assert policy.ledger.deficit("a") == 968 and replica.s.steward.accounts.all()["a"].service == 32
    unseen = replica.ask("a", [1] * 9, 1)
    replica.end(unseen, "abort")
    assert policy.ledger.deficit("a") == 968 and not replica.s.waiting_clients


def test_an_abort_gives_back_no_more_than_a_quantum():
    policy = DeficitLongestPrefixMatch(quantum=10)
    replica = Replica(policy, budget=16)
    first = replica.ask("a", list(range(100)), 5)
    replica.ask("a", [1] * 9, 1)
    replica.step()
    assert policy.ledger.deficit("a") == 10 - 100, "a full step is no reason for a refill"
    replica.end(first, "abort")
    assert policy.ledger.deficit("a") == 10 - 16
    replica.steps()


def test_every_choice_is_charged_and_its_prompt_once():
    policy = DeficitLongestPrefixMatch(quantum=1000)
    replica = Replica(policy, rows=4, budget=64)
    replica.ask("a", list(range(21)), 3, n=3)
    replica.steps()
    assert policy.ledger.deficit("a") == 1000 - 21 - 2 * 9


def test_charging_all_input_charges_the_cached_part_too():
    policy = DeficitLongestPrefixMatch(1000, ServiceCost(charge="input"))
    replica = Replica(policy)
    for _ in range(2):
        replica.ask("a", [1] * 21, 1)
        replica.steps()
    assert policy.ledger.deficit("a") == 1000 - 2 * (21 + 2)


def test_a_policy_that_fails_loses_nobody(caplog):
    class Broken(DeficitLongestPrefixMatch):
        def schedule(self, waiting, view, try_admit):
            try_admit(max(waiting, key=lambda q: q.order))
            raise KeyError("gone")

        def victim(self, running):
            return None

        def on_finish(self, request, uncomputed):
            raise ZeroDivisionError

    replica = Replica(Broken(quantum=50), pages=16, rows=4)
    asked = [replica.ask("ab"[i % 2], [i] * 9, 20) for i in range(6)]
    with caplog.at_level(logging.ERROR):
        replica.steps()
    assert all(q.finish_reason == "length" for q in asked) and replica.started[0] is asked[-1]
    assert replica.s.steward.errors > 6 and replica.s.counters.preemptions > 0
    assert [record.message for record in caplog.records] == [
        "the scheduling policy dlpm failed; first come, first served stands in"
    ]


def test_what_the_scheduler_itself_raises_is_not_taken_for_the_policys():
    replica = Replica(FirstComeFirstServed())
    replica.ask("a", [1], 1)
    replica.s._start = lambda sequence: 1 / 0
    with pytest.raises(ZeroDivisionError):
        replica.s.plan()


def test_lower_priorities_wait_whatever_their_credit():
    policy = DeficitLongestPrefixMatch(quantum=100)
    replica = Replica(policy, rows=1)
    for i in range(3):
        replica.ask("poor", [i] * 50, 5)
        replica.ask("rich", [50 + i] * 5, 1, priority=1)
    replica.steps()
    assert [q.client for q in replica.started] == ["poor"] * 3 + ["rich"] * 3
    assert replica.certificate.backlogged == 0 and replica.certificate.max_gap == 0


def test_accounts_go_on_in_a_scheduler_that_takes_over():
    policy = DeficitLongestPrefixMatch(quantum=100)
    replica = Replica(policy, rows=1)
    for i in range(3):
        replica.ask("a", [i] * 9, 4)
    replica.step()
    replica.end(replica.s.running[0], "error")
    old = replica.s
    replica.s = Replica(policy, rows=1).s
    replica.s.take_over(old)
    replica.steps()
    assert len(replica.finished) == 3 and replica.s.waiting_clients == {}
    assert replica.s.steward.accounts.all()["a"].service == replica.service["a"] == 27 + 2 * 9
    assert policy._open == {}
