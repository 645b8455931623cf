"""Deficits: never above a quantum, never a charge lost, and the same however routers hear of each other."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxstack.runtime.errors import UserError
from jaxstack.serving.router.deficits import EVERYBODY_ELSE, ReplicaDeficits

REPLICAS = ["a", "b", "c"]
charges = st.lists(st.tuples(st.sampled_from("xy"), st.sampled_from(REPLICAS), st.integers(1, 250)), max_size=60)


@given(charges, st.integers(1, 100))
def test_refills_only_when_nothing_is_left_and_never_above_the_quantum(told: list, quantum: int) -> None:
    deficits = ReplicaDeficits(quantum)
    charged: dict[tuple[str, str], int] = {}
    for client, _, service in told:
        row = deficits.admit(client)
        before = deficits.row(row)
        able = deficits.with_credit(row, REPLICAS)
        after = deficits.row(row)
        assert able and all(after[name] > 0 for name in able) and max(after.values()) <= quantum
        if any(before.get(name, 0) > 0 for name in REPLICAS):
            assert after == before
        else:  # as many rounds as it takes, not one more
            (rounds,) = {after[name] - before.get(name, 0) for name in REPLICAS}
            assert rounds % quantum == 0 and max(after.values()) - quantum <= 0
        deficits.charge(row, able[0], service)
        charged[client, able[0]] = charged.get((client, able[0]), 0) + service
    for (client, name), total in charged.items():
        granted, counted = deficits.changes()["rows"][client]["counts"][name]
        assert counted == total and granted - counted == deficits.deficit(client, name)


@given(charges, st.permutations(range(6)), st.data())
def test_routers_agree_in_whatever_order_and_however_often_they_hear(told: list, order: list[int], data) -> None:
    routers = {name: ReplicaDeficits(100) for name in ("r", "s", "t")}
    sent: list[tuple[str, dict]] = []
    for client, replica, service in told:
        name = data.draw(st.sampled_from(sorted(routers)))
        routers[name].admit(client)
        routers[name].with_credit(client, REPLICAS)
        routers[name].charge(client, replica, service)
        sent.append((name, json.loads(json.dumps(routers[name].changes()))))
    # Old news, in any order, then everybody's last word, twice.
    for number in order:
        if sent:
            name, news = sent[number % len(sent)]
            for other in routers.keys() - {name}:
                routers[other].merge(name, news["rows"])
    for _ in range(2):
        for name, news in {name: router.changes() for name, router in routers.items()}.items():
            for other in routers.keys() - {name}:
                routers[other].merge(name, json.loads(json.dumps(news))["rows"])
    rows = [{client: router.row(client) for client in "xy"} for router in routers.values()]
    clean = [{c: {r: v for r, v in row.items() if v} for c, row in each.items()} for each in rows]
    assert clean[0] == clean[1] == clean[2]


def test_only_what_changed_is_told() -> None:
    deficits = ReplicaDeficits(10)
    for client in "xy":
        deficits.charge(deficits.admit(client), "a", 5)
    version = deficits.changes()["version"]
    assert deficits.changes(version)["rows"] == {}
    deficits.charge("x", "b", 1)
    assert deficits.changes(version)["rows"].keys() == {"x"}


def test_the_longest_idle_without_debts_gives_up_its_row() -> None:
    deficits = ReplicaDeficits(10, max_clients=3)
    for client in "xyz":
        deficits.begin(deficits.admit(client))
    deficits.charge("x", "a", 5)  # owes
    for client in "xy":
        deficits.end(client)
    assert deficits.admit("new") == "new" and "y" not in deficits.clients()  # z is busy
    deficits.begin("new")
    assert deficits.admit("newer") == EVERYBODY_ELSE and deficits.crowded == 1
    assert deficits.deficit("x", "a") == -5
    assert deficits.admit("x") == "x"


def test_a_row_that_comes_back_begins_anew_at_the_other_routers_too() -> None:
    here, there = ReplicaDeficits(10, max_clients=1), ReplicaDeficits(10)
    here.with_credit(here.admit("x"), ["a"])
    here.charge("x", "a", 4)
    there.merge("here", here.changes()["rows"])
    assert there.deficit("x", "a") == 6
    here.admit("y")
    here.admit("x")
    here.with_credit("x", ["a"])
    there.merge("here", here.changes()["rows"])
    assert there.deficit("x", "a") == 10 == here.deficit("x", "a")
    there.charge("x", "a", 3)
    there.forget_router("here")
    assert there.deficit("x", "a") == -3


@pytest.mark.parametrize("options", [{"quantum": 0}, {"quantum": 1.5}, {"quantum": 5, "max_clients": 0}])
def test_bad_settings(options: dict) -> None:
    with pytest.raises(UserError, match="found"):
        ReplicaDeficits(**options)
