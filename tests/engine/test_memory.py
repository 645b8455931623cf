"""Pages and prefix cache against an oracle: a dict from token prefixes to pages, and exact accounting after every
operation.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.engine.memory import PagePool, RadixTree
from jaxstack.engine.memory.pages import Owner

PAGE = 4


def check(pool: PagePool, tree: RadixTree, held: list) -> None:
    owned = [p for node in tree.nodes() for p in node.pages]
    private = [p for _, pages in held for p in pages]
    assert sorted(owned + private) == sorted(set(owned + private))
    assert (pool.tree, pool.private) == (len(owned), len(private))
    assert pool.free + len(owned) + len(private) == pool.size
    assert all(pool.owner(p) == Owner.TREE for p in owned)
    assert tree.evictable == sum(len(n.pages) for n in tree.nodes() if n.lock == 0)
    for node in tree.nodes():
        assert len(node.keys) == len(node.pages) > 0
        assert node.parent.children[node.keys[0]] is node
        assert node.parent.parent is None or node.parent.lock >= node.lock


def longest(oracle: dict, keys: list) -> list:
    pages = []
    for i in range(len(keys)):
        page = oracle.get(tuple(keys[: i + 1]))
        if page is None:
            break
        pages.append(page)
    return pages


def test_ten_thousand_random_operations_agree_with_a_dict_of_prefixes():
    rng = random.Random(0)
    pool = PagePool(60)
    tree = RadixTree(pool)
    oracle: dict[tuple, int] = {}  # every cached prefix of whole pages -> its last page
    locks: list = []
    for turn in range(10_000):
        # A small alphabet makes shared prefixes; four random tokens a page would hardly ever meet.
        keys = [(rng.randrange(3), 0, 0, 0) for _ in range(rng.randrange(0, 10))]
        kind = rng.random()
        if kind < 0.5:
            found = tree.match(keys)
            assert found.pages == longest(oracle, keys)
            assert tree.peek(keys) == len(found.pages)
            if kind < 0.1 and found.pages:
                tree.lock(found.node)
                locks.append((found.node, tuple(keys[: len(found.pages)])))
        elif kind < 0.8:
            before = longest(oracle, keys)
            missing = len(keys) - len(before)
            guard = tree.match(keys).node
            tree.lock(guard)
            if missing > pool.free:
                evict(tree, oracle, missing - pool.free)
            if missing <= pool.free:
                mine = before + pool.allocate(missing)
                match = tree.insert(keys, mine)
                assert match.pages == mine
                for i, page in enumerate(mine):
                    oracle[tuple(keys[: i + 1])] = page
            tree.unlock(guard)
        elif kind < 0.9 and locks:
            node, _ = locks.pop(rng.randrange(len(locks)))
            tree.unlock(node)
        else:
            evict(tree, oracle, rng.randrange(1, 6))
        for _, prefix in locks:
            assert prefix in oracle, "a locked prefix was evicted"
        if turn % 50 == 0:
            check(pool, tree, [])
    assert len(oracle) == pool.tree > 0
    for node, _ in locks:
        tree.unlock(node)
    assert tree.clear() > 0
    check(pool, tree, [])
    assert pool.free == pool.size


def evict(tree, oracle, count):
    before = tree.evictable
    freed = tree.evict(count)
    assert freed == min(count, before)
    alive = {p for node in tree.nodes() for p in node.pages}
    for prefix in [k for k, page in oracle.items() if page not in alive]:
        del oracle[prefix]


def test_eviction_takes_the_least_recently_used_leaf_from_its_end():
    pool = PagePool(8)
    tree = RadixTree(pool)
    keys = [(i,) * PAGE for i in range(6)]
    tree.insert(keys[:2], pool.allocate(2))
    tree.insert([keys[0], keys[2], keys[3]], [tree.match(keys[:1]).pages[0], *pool.allocate(2)])
    tree.match(keys[:2])  # used again: the other branch goes first
    assert tree.evict(1) == 1
    assert tree.peek([keys[0], keys[2], keys[3]]) == 2
    assert tree.evict(1) == 1
    assert (tree.peek([keys[0], keys[2]]), tree.peek(keys[:2])) == (1, 2)


def test_namespaces_do_not_share():
    pool = PagePool(4)
    tree = RadixTree(pool)
    key = [(1, 2, 3, 4)]
    tree.insert(key, pool.allocate(1), namespace="a")
    assert (tree.peek(key, "a"), tree.peek(key, "b"), tree.peek(key)) == (1, 0, 0)


def test_a_second_copy_of_a_prefix_stays_with_its_maker():
    pool = PagePool(4)
    tree = RadixTree(pool)
    key = [(1, 2, 3, 4)]
    first, second = pool.allocate(1), pool.allocate(1)
    tree.insert(key, first)
    assert tree.insert(key, second).pages == first
    assert pool.owner(second[0]) == Owner.PRIVATE


@given(st.lists(st.integers(1, 5), max_size=20))
@settings(max_examples=50, deadline=None)
def test_pages_come_back_once(sizes):
    pool = PagePool(20)
    held = []
    for size in sizes:
        if size <= pool.free:
            held.append(pool.allocate(size))
        else:
            with pytest.raises(IndexError):
                pool.allocate(size)
    pages = [p for run in held for p in run]
    assert len(pages) == len(set(pages))
    pool.release(pages)
    assert pool.free == 20
    if pages:
        with pytest.raises(AssertionError, match="FREE, expected PRIVATE"):
            pool.release(pages[:1])
