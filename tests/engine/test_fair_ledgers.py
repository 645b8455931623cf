"""Costs, ledgers, the default quantum, the certificate and prefix lengths, each against what it is defined as."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.memory import PagePool, RadixTree
from jaxstack.engine.scheduling import (
    DeficitLedger,
    FairnessCertificate,
    PrefixLengths,
    ServiceCost,
    policy_named,
    tokens_after_admission,
)
from jaxstack.engine.scheduling import certificate as certificate_module
from jaxstack.engine.scheduling.quantum import RecentQuantum
from jaxstack.runtime.errors import UserError


def test_service_is_charged_for_what_is_computed_or_for_all_that_comes_in():
    assert ServiceCost().of_prompt(100, 60) == 40 and ServiceCost().of_output(7) == 14
    assert ServiceCost(extend=3, output=5, charge="input").of_prompt(100, 60) == 300


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ServiceCost(extend=0), "extend: found 0, expected an integer >= 1"),
        (lambda: ServiceCost(output=-1), "output: found -1, expected an integer >= 0"),
        (lambda: ServiceCost(output=1.5), "output: found 1.5, expected an integer >= 0"),
        (lambda: ServiceCost(charge="all"), "charge: found 'all', expected extend or input"),
        (lambda: policy_named("dlpm", quantum=0), "quantum: found 0, expected an integer >= 1"),
        (lambda: policy_named("dlpm", max_overtakes=0), "max_overtakes: found 0, expected an integer >= 1"),
        (lambda: policy_named("vtc", weights={"a": 0}), "weights['a']: found 0, expected an integer >= 1"),
        (lambda: policy_named("lpm", quantum=5), "quantum: found 5 for the policy 'lpm', expected none but for dlpm"),
        (lambda: policy_named("best"), "policy: found 'best', expected one of fcfs, lpm, vtc, dlpm"),
        (lambda: DeficitLedger(5, max_clients=0), "max_clients: found 0, expected an integer >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make, words):
    with pytest.raises(UserError) as refused:
        make()
    assert str(refused.value) == words


@given(
    st.integers(1, 50),
    st.dictionaries(st.integers(0, 4), st.integers(1, 3)),
    st.lists(
        st.one_of(
            st.tuples(st.just("charge"), st.integers(0, 4), st.integers(-20, 200)),
            st.tuples(st.just("refill"), st.integers(1, 4), st.none()),
            st.tuples(st.just("until"), st.sets(st.integers(0, 4), min_size=1), st.none()),
        ),
        max_size=30,
    ),
)
def test_many_refills_at_once_are_as_many_single_ones(quantum, weights, actions):
    ledger, plain = DeficitLedger(quantum, weights), dict.fromkeys(range(5), 0)
    for key in plain:
        ledger.seen(key)

    def refill():
        for key, deficit in plain.items():
            plain[key] = deficit + (quantum * weights.get(key, 1) if deficit <= 0 else 0)

    for what, which, amount in actions:
        if what == "charge":
            ledger.charge(which, amount)
            plain[which] -= amount
        elif what == "refill":
            ledger.refill_debtors(which)
            for _ in range(which):
                refill()
        elif all(plain[key] <= 0 for key in which):
            rounds = ledger.refill_until_credit(which)
            for done in range(rounds):
                assert all(plain[key] <= 0 for key in which), f"{done} rounds were enough"
                refill()
            assert any(plain[key] > 0 for key in which)
        assert {key: ledger.deficit(key) for key in plain} == plain == ledger.deficits()
    copy = DeficitLedger(1, weights)
    copy.restore(ledger.snapshot())
    assert copy.deficits() == plain and copy.quantum == quantum


def test_a_refill_can_be_for_some_keys():
    ledger = DeficitLedger(10)
    for key in (("a", 0), ("a", 1), ("b", 0)):
        ledger.charge(key, 25)
    ledger.refill_debtors(2, among=[("a", 0), ("a", 1), ("a", 2)])
    assert [ledger.deficit(key) for key in (("a", 0), ("a", 1), ("a", 2), ("b", 0))] == [-5, -5, 10, -25]


def test_a_full_ledger_loses_no_debt():
    ledger = DeficitLedger(10, max_clients=2)
    ledger.charge("debtor", 30)
    ledger.seen("rich")
    ledger.refill_debtors(1)
    ledger.idle("debtor")
    ledger.idle("rich")
    ledger.seen("new")  # the one who owes nothing leaves, not the one idle for longest
    assert ledger.deficits() == {"debtor": -20, "new": 0}
    ledger.seen("rich")  # nobody may leave now: it shares an account with whoever comes next
    ledger.charge("rich", 8)
    ledger.charge("another", 4)
    assert ledger.crowded == 2 and ledger.deficit("rich") == ledger.deficit("another") == -12
    copy = DeficitLedger(1)
    copy.restore(ledger.snapshot())
    assert copy.deficit("another") == -12 and copy.deficits() == ledger.deficits()
    ledger.idle("new")
    ledger.seen("rich")
    assert ledger.deficit("rich") == -12, "an own account would wipe the debt of the shared one"
    ledger.refill_until_credit(["rich"])
    assert ledger.deficit("rich") == ledger.deficit("another") == 8
    ledger.seen("rich")
    assert ledger.deficits() == {"new": 10, "rich": 0} and ledger.deficit("another") == 8


def test_the_default_quantum_goes_by_recent_requests_and_fits_the_largest():
    rule = RecentQuantum()
    rule.expect(300)
    rule.expect(100)
    assert rule.value == 600
    for cost in range(1, 33):
        rule.learn(cost, 40)
    assert rule.value == 62  # twice the 31st of 32
    for _ in range(32):
        rule.learn(10, 900)
    assert rule.value == 900


# The certificate.


def brute_force_gap(history, weights):
    """The largest difference in service over any interval in which both of a pair are backlogged throughout."""
    clients = sorted(weights)
    largest = 0.0
    for f, g in itertools.combinations(clients, 2):
        for begin in range(len(history)):
            ahead = 0.0
            for service, backlogged in history[begin:]:
                if service is not history[begin][0]:
                    ahead += service.get(f, 0) / weights[f] - service.get(g, 0) / weights[g]
                if not {f, g} <= backlogged:
                    break
                largest = max(largest, abs(ahead))
    return largest


_steps = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("abcd"), st.integers(-3, 30)),
        st.sets(st.sampled_from("abcd")),
    ),
    max_size=14,
)


@given(_steps, st.dictionaries(st.sampled_from("abcd"), st.sampled_from([1, 2, 4])))
@settings(deadline=None)
def test_the_gap_is_the_largest_over_all_pairs_and_intervals(steps, weights):
    certificate = FairnessCertificate(ServiceCost(), 100, weights)
    history = []
    every = {client: weights.get(client, 1) for client in "abcd"}
    for at, (service, backlogged) in enumerate(steps):
        service = dict(service)  # an identity of its own
        certificate.observe(service, backlogged, float(at))
        history.append((service, backlogged))
        assert certificate.max_gap == brute_force_gap(history, every)
    assert certificate.exact and certificate.gap_over_bound == certificate.max_gap / 100
    assert (certificate.pair is None) == (certificate.max_gap == 0)


@given(_steps)
@settings(deadline=None)
def test_among_many_clients_the_gap_is_never_understated(steps):
    sufficient, exact = FairnessCertificate(ServiceCost()), FairnessCertificate(ServiceCost())
    for at, (service, backlogged) in enumerate(steps):
        exact.observe(service, backlogged, float(at))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(certificate_module, "_PAIRS", 0)
            sufficient.observe(service, backlogged, float(at))
        assert sufficient.gap >= exact.gap - 1e-9
    assert sufficient.max_gap >= exact.max_gap - 1e-9 and sufficient.gap_over_bound is None


def test_the_certificate_names_the_pair_and_since_when():
    certificate = FairnessCertificate(ServiceCost(), 10)
    certificate.observe({"a": 50}, {"a"}, 0.0)
    certificate.observe({"a": 50}, {"a", "b"}, 1.0)  # both from now on
    certificate.observe({"a": 3, "b": 1}, {"a", "b", "c"}, 2.0)
    certificate.observe({"a": 2, "c": 9}, {"a", "b", "c"}, 3.0)
    assert (certificate.max_gap, certificate.pair, certificate.since_s) == (9.0, ("c", "b"), 2.0)
    certificate.observe({}, set(), 4.0)
    assert certificate.backlogged == 0 and certificate.max_gap == 9.0 and certificate.gap_over_bound == 0.9


def test_what_can_be_generated_after_the_last_admission():
    assert tokens_after_admission(100, 8, 10_000, reserve=False) == 800
    assert tokens_after_admission(100, 8, 10_000, reserve=True) == 800
    assert tokens_after_admission(1000, 1000, 1000, reserve=True) == 1000
    # With pages on demand the sum of min(B, M / p): about M ln(L).
    plain = sum(min(1000, 1000 // p) for p in range(1, 1001))
    assert tokens_after_admission(1000, 1000, 1000, reserve=False) == plain == 7069


# Prefix lengths.


def test_lengths_agree_with_comparing_token_by_token_while_the_cache_changes():
    rng = random.Random(1)
    pool = PagePool(80)
    tree = RadixTree(pool)

    def prompt():
        return tuple((rng.randrange(3), rng.randrange(2)) for _ in range(rng.randrange(12)))

    waiting = {i: (prompt(), rng.choice([None, "x"])) for i in range(60)}

    def extend(i, chain):
        keys, namespace = waiting[i]
        more = keys[len(chain) : len(chain) + 3]
        chain += tree.chain_hashes(more, namespace, chain[-1] if chain else None)
        return bool(more)

    lengths = PrefixLengths(tree, extend)

    def cached() -> dict[str | None, set[tuple]]:
        """Every cached prefix, read off the tree itself."""
        found: dict[str | None, set[tuple]] = {None: {()}, "x": {()}}
        for namespace, root in tree._roots.items():
            stack = [((), root)]
            while stack:
                before, node = stack.pop()
                stack.extend((before + tuple(node.keys), child) for child in node.children.values())
                found[namespace].update(before + tuple(node.keys[: n + 1]) for n in range(len(node.keys)))
        return found

    for turn in range(600):
        kind = rng.random()
        if kind < 0.4:
            keys, namespace = rng.choice([*waiting.values(), (prompt(), None)])
            have = tree.peek(keys, namespace)
            if pool.free < len(keys) - have:
                tree.evict(len(keys))
                have = tree.peek(keys, namespace)
            pages = pool.allocate(len(keys) - have)
            tree.insert(keys, [-1] * have + pages, namespace)
        elif kind < 0.6:
            tree.evict(rng.randrange(1, 9))
        elif kind < 0.63:
            tree.drop("x")
        elif kind < 0.8:
            gone = rng.choice(list(waiting))
            del waiting[gone]
            lengths.forget(gone)
            waiting[1000 + turn] = (prompt(), rng.choice([None, "x"]))
        prefixes = cached()
        expected = [
            max(n for n in range(len(keys) + 1) if tuple(keys[:n]) in prefixes[namespace])
            for keys, namespace in waiting.values()
        ]
        assert lengths.of(list(waiting)) == expected
        assert len(tree.cached) == pool.tree
