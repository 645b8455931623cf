"""The policies against cases worked by hand, and D2LPM against its algorithm written out plainly."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxstack.runtime.errors import UserError
from jaxstack.serving.router import (
    ROUTING_POLICIES,
    CacheAware,
    D2Lpm,
    LeastLoad,
    Preble,
    RoundRobin,
    RoutedRequest,
    RoutingPolicy,
    routing_policy_named,
)


@dataclasses.dataclass
class Replica:
    name: str
    active: int = 0


class Cluster:
    """Replicas that do nothing, and a clock."""

    def __init__(self, policy: RoutingPolicy, names: str = "abc"):
        self.policy, self.replicas = policy, [Replica(name) for name in names]
        self.where: dict[RoutedRequest, Replica] = {}

    def send(self, request: RoutedRequest) -> str:
        chosen = self.policy.choose(request, self.replicas)
        assert chosen in self.replicas
        self.policy.on_dispatch(request, chosen)
        chosen.active += 1
        self.where[request] = chosen
        return chosen.name

    def finish(self, request: RoutedRequest, cached: int | None = None, output: int = 0) -> None:
        replica = self.where.pop(request)
        replica.active -= 1
        self.policy.on_finish(request, replica, cached, output)


def ask(client: str, *tokens: int, page: int = 1) -> RoutedRequest:
    return RoutedRequest.of_tokens(client, tokens, 8, page)


def test_round_robin() -> None:
    cluster = Cluster(RoundRobin())
    assert "".join(cluster.send(ask(client, 1)) for client in "xyxxx") == "abcab"
    cluster = Cluster(RoundRobin(per_client=True))
    assert "".join(cluster.send(ask(client, 1)) for client in "xyxxy") == "aabcb"


def test_least_load() -> None:
    cluster = Cluster(LeastLoad())
    first, second, third = (ask("x", i) for i in range(3))
    assert [cluster.send(r) for r in (first, second, third)] == ["a", "b", "c"]
    cluster.finish(second)
    assert cluster.send(ask("x", 3)) == "b"
    assert cluster.send(ask("x", 4)) == "a"  # all equal: the one chosen longest ago


def test_cache_aware() -> None:
    cluster = Cluster(CacheAware(cache_threshold=0.3, balance_abs=4, balance_rel=1.5))
    long = ask("x", *range(10))
    assert cluster.send(long) == "a"
    assert cluster.send(ask("x", 0, 1, 2, 3, *range(50, 56))) == "a"  # 4 of 10 are there
    assert cluster.send(ask("x", 0, 1, 2, *range(60, 67))) == "b"  # 3 of 10: not more than the threshold
    assert cluster.send(ask("x", 99)) == "c"  # nothing: the smallest tree
    cluster.replicas[0].active += 3  # 5 against 1 is not more than 4 apart
    assert cluster.send(ask("x", *range(10))) == "a"
    assert cluster.send(ask("x", *range(10))) == "b"  # 6 against 1
    # Far apart, but not by more than half: 15 against 10.
    cluster.replicas[0].active, cluster.replicas[1].active, cluster.replicas[2].active = 15, 10, 15
    assert cluster.send(ask("x", 99)) == "c"


def test_preble() -> None:
    now = [0.0]
    cluster = Cluster(Preble(threshold=0.5, window_s=60.0, clock=lambda: now[0]), "ab")
    first = ask("x", *range(10))
    assert cluster.send(first) == "a"
    assert cluster.send(ask("x", *range(6), *range(50, 54))) == "a"  # 6 of 10
    assert cluster.send(ask("x", *range(5), *range(60, 65))) == "b"  # 5 of 10: a has been given more
    assert cluster.send(ask("x", 70, 71, 72, 73, 74, 75)) == "b"  # 10 against 14
    assert cluster.send(ask("x", 80)) == "a"
    cluster.finish(first, output=3)
    assert cluster.send(ask("x", 81)) == "b"  # 16 against 21
    now[0] = 100.0  # all of it long ago
    assert cluster.send(ask("x", 82)) == "a" and cluster.send(ask("x", 83)) == "b"


def test_d2lpm_by_hand() -> None:
    policy = D2Lpm(quantum=20)
    cluster = Cluster(policy, "ab")
    first = ask("x", *range(10))
    assert cluster.send(first) == "a"  # both refilled to 20; charged 10
    assert policy.deficits.row("x") == {"a": 10, "b": 20}
    again = ask("x", *range(8), 50, 51)
    assert cluster.send(again) == "a"  # where its 8 are; 2 to compute
    assert policy.deficits.row("x") == {"a": 8, "b": 20}
    cluster.finish(first, cached=0, output=4)  # 8 for the output
    assert policy.deficits.row("x") == {"a": 0, "b": 20}
    elsewhere = ask("x", *range(10))
    assert cluster.send(elsewhere) == "b"  # nothing left at a
    assert policy.deficits.row("x") == {"a": 0, "b": 10}
    cluster.finish(again, cached=3, output=0)  # 7 to compute, 2 expected
    assert policy.deficits.row("x") == {"a": -5, "b": 10}
    other = ask("y", *range(10))
    assert cluster.send(other) == "a"  # another client has its own; a is less busy
    cluster.finish(elsewhere, cached=10, output=10)
    assert policy.deficits.row("x") == {"a": -5, "b": 0}
    assert cluster.send(ask("x", 77)) == "b"  # refilled to 15 and 20, b is free
    assert policy.deficits.row("x") == {"a": 15, "b": 19}


def test_d2lpm_charges_all_input_if_told_so() -> None:
    policy = D2Lpm(quantum=100, charge="input")
    cluster = Cluster(policy, "a")
    for _ in range(2):
        request = ask("x", *range(10))
        cluster.send(request)
        cluster.finish(request, cached=10, output=1)
    assert policy.deficits.row("x") == {"a": 100 - 2 * 12}


def test_a_failed_request_costs_nothing() -> None:
    policy = D2Lpm(quantum=100)
    cluster = Cluster(policy, "ab")
    request = ask("x", *range(10))
    cluster.send(request)
    replica = cluster.where.pop(request)
    policy.on_restart(replica)
    policy.on_failed(request, replica)
    assert policy.deficits.row("x") == {"a": 100, "b": 100} and policy.cached(request, replica) == 0
    assert not policy._charged
    policy.on_dispatch(request, cluster.replicas[1])  # the same request, elsewhere
    assert policy.deficits.row("x") == {"a": 100, "b": 90}


def test_evicted_prefixes_are_not_counted_on() -> None:
    policy = D2Lpm(quantum=1000)
    cluster = Cluster(policy, "ab")
    request = ask("x", *range(10))
    assert cluster.send(request) == "a"
    cluster.finish(request, cached=0)
    assert policy.cached(request, cluster.replicas[0]) == 10
    # What is on its way there will be there, whatever is said of the past.
    other = ask("x", *range(6), 77, 78)
    assert cluster.send(other) == "a"
    policy.on_evicted(cluster.replicas[0], request.keys[4:5])
    assert policy.cached(request, cluster.replicas[0]) == 10
    policy.on_evicted(cluster.replicas[0], request.keys[6:])
    assert policy.cached(request, cluster.replicas[0]) == 6
    cluster.finish(other, cached=4)
    policy.on_evicted(cluster.replicas[0], request.keys[4:5])
    assert policy.cached(request, cluster.replicas[0]) == 4 and not policy._coming["a"]


@dataclasses.dataclass
class Plain:
    """Algorithm 2 with the choice among equals of `D2Lpm`, on lists of tokens."""

    quantum: int
    names: str
    q: dict = dataclasses.field(default_factory=dict)
    size: dict = dataclasses.field(default_factory=dict)
    sent: dict = dataclasses.field(default_factory=dict)

    def dispatch(self, client: str, tokens: tuple[int, ...]) -> tuple[str, int]:
        def match(name: str) -> int:
            return max((common(tokens, old) for old in self.sent.get(name, [])), default=0)

        q, size = self.q, self.size
        while not any(q.get((client, name), 0) > 0 for name in self.names):
            for name in self.names:
                q[client, name] = q.get((client, name), 0) + self.quantum
        able = [name for name in self.names if q.get((client, name), 0) > 0]
        longest = max(map(match, self.names))
        among = [name for name in able if match(name) == longest] or able
        chosen = min(among, key=lambda name: (size.get(name, 0), -q.get((client, name), 0), name))
        charge = len(tokens) - match(chosen)
        q[client, chosen] -= charge
        size[chosen] = size.get(chosen, 0) + 1
        self.sent.setdefault(chosen, []).append(tokens)
        return chosen, charge


def common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@given(
    st.lists(
        st.tuples(
            st.sampled_from("xyz"),
            st.lists(st.integers(0, 1), min_size=1, max_size=8).map(tuple),
            st.integers(0, 5),  # how many are under way before it ends
            st.none() | st.integers(0, 8),
            st.integers(0, 9),
        ),
        max_size=40,
    ),
    st.integers(1, 40),
)
def test_d2lpm_is_its_algorithm(asked: list, quantum: int) -> None:
    policy = D2Lpm(quantum=quantum)
    cluster, plain = Cluster(policy, "abc"), Plain(quantum, "abc")
    under_way: list = []
    for client, tokens, patience, cached, output in asked:
        request = ask(client, *tokens)
        name, charge = plain.dispatch(client, tokens)
        assert cluster.send(request) == name
        under_way.append((request, name, client, charge, cached, output))
        while len(under_way) > patience:
            request, name, client, charge, cached, output = under_way.pop(0)
            cluster.finish(request, cached, output)
            actual = charge if cached is None else max(0, request.prompt_tokens - cached)
            plain.q[client, name] += charge - actual - 2 * output
            plain.size[name] -= 1
        for (client, name), q in plain.q.items():
            assert policy.deficits.deficit(client, name) == q


@pytest.mark.parametrize("name", ROUTING_POLICIES)
def test_every_policy_can_be_named_and_routes(name: str) -> None:
    cluster = Cluster(routing_policy_named(name))
    requests = [ask("xy"[i % 2], *range(i % 4), i) for i in range(40)]
    for request in requests:
        cluster.send(request)
    for request in requests:
        cluster.finish(request, cached=1, output=2)
    assert all(replica.active == 0 for replica in cluster.replicas) and cluster.policy.report() is not None


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"policy: found 'fastest', expected one of round_robin, .*d2lpm"):
        routing_policy_named("fastest")
    with pytest.raises(UserError, match="policy: least_load does not take these options"):
        routing_policy_named("least_load", quantum=3)
    for options in ({"quantum": 0}, {"charge": "all"}, {"output": -1}, {"expiry_s": 0}):
        with pytest.raises(UserError, match=f"{next(iter(options))}: found"):
            D2Lpm(**options)
    for policy in (CacheAware, Preble):
        with pytest.raises(UserError, match="threshold: found 2"):
            policy(2)
