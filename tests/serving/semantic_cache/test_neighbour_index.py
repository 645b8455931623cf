"""The index against exact search over the same rows, through additions, removals and the change to a graph."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.serving.semantic_cache.index import NeighbourIndex, usable
from jaxstack.serving.semantic_cache.policy import NO_ENTRY


def vectors(count, dim, seed=0, clusters=None):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, dim))
    if clusters is not None:
        rows = rng.normal(size=(clusters, dim))[rng.integers(0, clusters, count)] + 0.3 * rows
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def nearest(rows, query, k):
    """Ids by brute force in float64."""
    return sorted(rows, key=lambda e: -float(rows[e].astype(np.float64) @ query))[:k]


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["add", "add", "remove", "look"]), st.integers(0, 2**16)), max_size=60),
    graph_from=st.sampled_from([4, 1000]),
)
def test_it_finds_what_looking_at_every_row_finds(steps, graph_from):
    index, rows = NeighbourIndex(6, background=False, graph_from=graph_from), {}
    for number, (what, draw) in enumerate(steps):
        if what == "add":
            rows[number] = vectors(1, 6, draw)[0]
            index.add([number], rows[number][None])
        elif what == "remove" and rows:
            gone = sorted(rows)[draw % len(rows)]
            del rows[gone]
            index.remove(gone)
            index.remove(gone)
        queries = vectors(2, 6, draw + 1)
        ids, near = index.search(queries, 4)
        for query, found, cosine in zip(queries, ids, near):
            true = nearest(rows, query, 4)
            # Of rows that are equally near, any may be found.
            live = [entry for entry in found.tolist() if entry != NO_ENTRY]
            assert len(set(live)) == len(live) == min(4, len(rows))
            assert np.allclose(cosine[: len(live)], [rows[entry] @ query for entry in live], atol=1e-6)
            assert np.allclose(cosine[: len(live)], [rows[entry] @ query for entry in true], atol=1e-6)
        assert len(index) == len(rows)


def test_the_graph_misses_next_to_nothing():
    rows = vectors(3000, 32, clusters=300)
    index = NeighbourIndex(32, background=False, graph_from=2000)
    index.add(range(2500), rows[:2500])
    assert not index.exact
    index.add(range(2500, 3000), rows[2500:])
    for entry in range(600):
        index.remove(entry)
    queries = rows[600:1100] + 0.02 * vectors(500, 32, 1)
    found, near = index.search(queries, 4)
    true, _ = index.search_exactly(queries, 4)
    assert (found[:, 0] == true[:, 0]).mean() >= 0.99
    assert found.min() >= 600
    assert (np.diff(near, axis=1) <= 0).all()


def test_many_removals_near_a_query_do_not_hide_what_is_left():
    rows = vectors(1000, 16)
    rows[:200] = rows[0]  # a crowd in one place
    index = NeighbourIndex(16, background=False, graph_from=500)
    index.add(range(1000), rows)
    for entry in range(199):
        index.remove(entry)
    ids, near = index.search(rows[:1], 2)
    assert ids[0, 0] == 199
    assert near[0, 0] == pytest.approx(1.0)
    assert ids[0, 1] >= 200


def test_searches_go_on_while_a_graph_is_built():
    rows = vectors(5000, 16, clusters=100)
    index = NeighbourIndex(16, graph_from=1000)
    wrong, over = [], threading.Event()

    def look():
        while not over.is_set():
            ids, _ = index.search(rows[7:8], 1)
            if ids[0, 0] != 7:
                wrong.append(ids)

    index.add(range(100), rows[:100])
    looking = threading.Thread(target=look)
    looking.start()
    for first in range(100, 5000, 100):
        index.add(range(first, first + 100), rows[first : first + 100])
        index.remove(first + 50)
    index.wait()
    over.set()
    looking.join()
    assert not wrong
    assert not index.exact
    assert len(index) == 5000 - 49
    ids, _ = index.search(rows[3050:3051], 1)
    assert ids[0, 0] != 3050 or 3050 % 100 != 50


def test_what_is_no_unit_vector_is_refused():
    index = NeighbourIndex(4)
    good = vectors(1, 4)
    index.add([1], good)
    for bad in (good * 2, good * np.nan, np.zeros((1, 4), np.float32), np.full((1, 4), np.inf)):
        assert not usable(bad)[0]
        with pytest.raises(ValueError, match="unit length"):
            index.add([2], bad)
    with pytest.raises(ValueError, match="expected 4"):
        index.add([2], vectors(1, 3))
    with pytest.raises(ValueError, match="already"):
        index.add([1], good)
    assert len(index) == 1


def test_all_entries_may_go_while_a_graph_begins():
    """The thread that builds finds nothing left; the next that is worth it is built all the same."""
    rows = vectors(600, 8)
    index = NeighbourIndex(8, graph_from=100)
    with index._lock:  # before the thread has looked
        index.add(range(200), rows[:200])
        for entry in range(200):
            index.remove(entry)
    index.wait()
    index.add(range(200, 600), rows[200:])
    index.wait()
    assert not index.exact
    ids, _ = index.search(rows[300:301], 1)
    assert ids[0, 0] == 300


def test_room_is_given_back():
    rows = vectors(2000, 8)
    index = NeighbourIndex(8)
    index.add(range(2000), rows)
    for entry in range(1990):
        index.remove(entry)
        assert len(index._ids) <= max(16, 4 * len(index) + 3)
    ids, _ = index.search(rows[1990:], 1)
    assert ids[:, 0].tolist() == list(range(1990, 2000))
