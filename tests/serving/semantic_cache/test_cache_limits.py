"""What is not kept, what goes, what fails, and what users complain of."""

import threading

import numpy as np
import pytest
from angles import DIM, Angles, ask, cache_of, said
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache import CacheConfig, CachedResponse, SemanticCache, TenantOverrides, learning


def test_poisoned_and_oversize_entries_are_refused():
    with cache_of(max_response_bytes=100, max_prompt_chars=50) as cache:
        ask(cache, "a", "x" * 101)
        ask(cache, "b", "half \ud800 a pair")
        request = cache.scope.prompt("c")
        cache.complete(cache.lookup([request])[0], CachedResponse("cut", finish_reason="length"))
        assert cache.stats("").entries == 0
        assert cache.stats("").refused == {"too large": 1, "not text": 1, "unfinished": 1}
        # Without a usable vector, only for the very same request.
        ask(cache, "nan")
        ask(cache, "a " + "1" * 60)
        assert ask(cache, "nan").kind == "exact"
        assert ask(cache, "a " + "1" * 60).kind == "exact"
        assert ask(cache, "nan 1").kind == "miss"
        assert all(not cache.entry("", n).semantic for n in (1, 2))


def test_an_embedder_that_fails_or_dawdles_is_passed_over():
    class Broken(Angles):
        def embed(self, texts):
            if texts[0].startswith("slow"):
                threading.Event().wait(1.0)
            if texts[0].startswith("shape"):
                return np.zeros((1, 3), np.float32)
            if texts[0].startswith("raise"):
                raise RuntimeError("no")
            return super().embed(texts)

    with SemanticCache(Broken(), CacheConfig(lookup_timeout_ms=400)) as cache:
        found = [ask(cache, word) for word in ("shape", "raise", "slow")]
        assert [lookup.kind for lookup in found] == ["bypass"] * 3
        assert [lookup.reason for lookup in found] == ["embedder", "embedder", "timeout"]
        assert cache.stats("").entries == 0


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 89), st.integers(1, 400), st.floats(0, 2)), min_size=1, max_size=40),
    st.sampled_from(["lru", "cost"]),
)
def test_capacity_is_never_exceeded(asked, eviction):
    with cache_of(max_entries=6, max_bytes=1500, eviction=eviction, threshold=1.0) as cache:
        for degrees, size, took in asked:
            lookup = cache.lookup([cache.scope.prompt(f"a {degrees}")])[0]
            cache.complete(lookup, CachedResponse("x" * size, generation_s=took))
            stats = cache.stats(None)
            assert stats.entries <= 6
            assert stats.size_bytes <= 1500


def test_what_has_saved_most_stays_and_with_lru_what_was_used_last():
    for eviction, stays in (("cost", "a"), ("lru", "b 80")):
        with cache_of(max_entries=3, eviction=eviction) as cache:
            for _ in range(5):
                ask(cache, "a", now_s=0.0)
            for n in range(3):
                ask(cache, f"b {n * 40}", now_s=1.0 + n)
            assert cache.repeat(cache.scope.prompt(stays), 9.0) is not None
            gone = {"cost": "b", "lru": "a"}[eviction]
            assert cache.repeat(cache.scope.prompt(gone), 9.0) is None


def test_expired_and_invalidated_entries_are_never_returned():
    with cache_of(ttl_s=10) as cache:
        ask(cache, "a", now_s=0.0)
        assert ask(cache, "a 1", now_s=9.9).kind == "hit"
        assert ask(cache, "a 1", now_s=10.0).kind == "miss"
        late = cache.scope.prompt("c")
        lookup = cache.lookup([late], 11.0)[0]
        for found, given in ((1, {"entry_id": 2}), (0, {"model": "x"})):
            assert cache.invalidate("", now_s=11.0, **given) == found
        cache.complete(lookup, CachedResponse("before the invalidation"), 11.0)
        assert ask(cache, "c", now_s=11.0).kind == "miss"
        assert cache.invalidate("", prompt_prefix="c", now_s=12.0) == 1
        ask(cache, "d", now_s=12.0)
        assert cache.invalidate("", older_than_s=5, now_s=18.0) == 1
        with pytest.raises(UserError, match="expected one of"):
            cache.invalidate("")


def test_complaints_retire_an_entry_at_once_and_each_answer_counts_once():
    with cache_of(feedback_per_minute=5) as cache:
        ask(cache, "a", now_s=0.0)
        for n in range(2):
            cache.remember(f"r{n}", ask(cache, f"a {n + 1}", now_s=0.0))
        assert cache.feedback("", False, response_id="r0", now_s=0.0) is True
        assert cache.feedback("", False, response_id="r0", now_s=0.0) is False
        assert ask(cache, "a 3", now_s=0.0).kind == "hit"
        assert cache.feedback("stranger", False, response_id="r1", now_s=0.0) is False
        assert cache.feedback("", False, response_id="r1", now_s=0.0) is True
        assert ask(cache, "a 3", now_s=0.0).kind == "miss"
        for _ in range(2):
            assert cache.feedback("", False, response_id="nothing", now_s=0.0) is False
        assert cache.feedback("", False, response_id="nothing", now_s=0.0) is None  # too often
        assert cache.feedback("", False, response_id="nothing", now_s=61.0) is False


def test_feedback_teaches_but_does_not_touch_the_estimate():
    with cache_of(policy="bayes", delta=0.5) as cache:
        ask(cache, "a")
        hits = [lookup for n in range(60) if (lookup := ask(cache, f"a 1 {n}")).kind == "hit"]
        cache.flush()
        cache.remember("r", hits[0])
        before = cache.stats("")
        alpha = ask(cache, "a 1 again").alpha
        assert cache.feedback("", False, response_id="r")
        assert ask(cache, "a 1 once more").alpha < alpha
        assert cache.stats("").labels >= before.labels + 1


# --------------------------------------------------------------------------------------------------------- what is kept


def sizes(cache):
    """What its entries take, counted anew."""
    return sum(
        len(e.response.text.encode()) + len(e.prompt.encode()) + (4 * DIM if e.semantic else 0)
        for account in cache._accounts.values()
        for e in account.entries.values()
    )


def test_sizes_are_those_of_what_is_there():
    """Also of an entry that comes to answer near requests only later, and of an answer that takes another's place."""
    with cache_of(policy="vcache", refresh_on_agree=True, max_bytes=300) as cache:
        ask(cache, "a", "yes")
        ask(cache, "a 40", "no")
        cache.flush()
        assert [e.semantic for e in cache._accounts["t:"].entries.values()] == [True, True]
        assert cache.stats(None).size_bytes == sizes(cache)
        ask(cache, "a 5", "yes" + "!" * 50)
        cache.flush()
        assert said(ask(cache, "a")) == "yes" + "!" * 50
        assert cache.stats(None).size_bytes == sizes(cache) <= 300
        for n in range(40):
            ask(cache, f"b {n}", f"answer {n}", tenant=f"t{n % 3}")
            cache.flush()
            assert cache.stats(None).size_bytes == sizes(cache) <= 300
            assert cache.stats(None).entries == sum(len(a.entries) for a in cache._accounts.values())


def test_an_answer_that_is_not_fit_to_be_kept_takes_no_others_place():
    with cache_of(policy="vcache", refresh_on_agree=True, max_response_bytes=10) as cache:
        ask(cache, "a", "yes")
        for text, answer, fields in (
            ("a 5", "Yes!", {"cache": {"mode": "read"}}),
            ("a 6", "yes" + "." * 20, {}),
            ("a 7", "yes \ud800", {}),
        ):
            ask(cache, text, answer, **fields)
            cache.flush()
            assert said(ask(cache, "a")) == "yes", text
        assert cache.stats("").labels == 3


# --------------------------------------------------------------------------------------------------------- what is slow


class Waiting:
    """A judge that says yes when it may."""

    def __init__(self):
        self.begun, self.go, self.asked = threading.Event(), threading.Event(), 0

    def same(self, query, a, b):
        self.asked += 1
        self.begun.set()
        assert self.go.wait(60)
        return True


def test_a_judge_that_cannot_keep_up_costs_labels_and_nothing_else(monkeypatch):
    monkeypatch.setattr(learning, "_WAITING", 3)
    judge = Waiting()
    with cache_of(policy="vcache") as cache:
        cache.judge = judge
        ask(cache, "a")
        for n in range(20):
            assert ask(cache, f"a 5 {n}").kind == "explore"
        assert cache._labels.qsize() <= 3
        judge.go.set()
        cache.flush()
        stats = cache.stats("")
        assert 3 <= stats.labels <= 5
        assert stats.pending == 0


def test_labels_that_the_judge_does_not_give_in_time_are_given_up():
    judge = Waiting()
    with cache_of(policy="bayes", label_timeout_s=10) as cache:
        cache.judge = judge
        ask(cache, "a", now_s=0.0)
        explored = sum(ask(cache, f"a 5 {n}", now_s=0.0).kind == "explore" for n in range(6))
        budget = cache._accounts["t:"].policy.budget
        assert cache.stats("").pending == explored > 2
        assert judge.begun.wait(30)
        ask(cache, "b", now_s=20.0, system="elsewhere")
        assert cache.stats("").pending == budget.pending == 0
        judge.go.set()
        cache.flush()
        assert cache.stats("").labels == 0
        assert judge.asked == 1  # of the others it was not asked any more


def test_invalidations_and_complaints_do_not_wait_for_the_judge():
    judge = Waiting()
    with cache_of(policy="vcache") as cache:
        cache.judge = judge
        ask(cache, "a")
        ask(cache, "a 5")
        assert judge.begun.wait(30)
        cache.remember("r", ask(cache, "a"))
        done = []
        calls = (
            lambda: done.append(cache.feedback("", False, response_id="r")),
            lambda: done.append(cache.invalidate("", everything=True)),
        )
        for call in calls:
            calling = threading.Thread(target=call)
            calling.start()
            calling.join(10)
        judge.go.set()
        cache.flush()
        assert done == [True, 2]
        assert cache.stats("").entries == 0


def test_nobody_waits_behind_an_embedder_that_hangs():
    go, calls = threading.Event(), []

    class Hung(Angles):
        def embed(self, texts):
            calls.append(texts)
            go.wait(60)
            return super().embed(texts)

    with SemanticCache(Hung(), CacheConfig(lookup_timeout_ms=50)) as cache:
        for n in range(20):
            assert cache.lookup([cache.scope.prompt(f"a {n}")])[0].reason == "timeout"
        assert len(calls) == 2  # one for each thread
        assert cache._embedding._work_queue.qsize() == 0
        go.set()


def test_an_index_that_fails_is_passed_over():
    with cache_of() as cache:
        ask(cache, "a")
        (index,) = cache._accounts["t:"].indexes.values()
        index.search = lambda *_: 1 / 0
        found = cache.lookup([cache.scope.prompt("a 5"), cache.scope.prompt("a")])
        assert [(lookup.kind, lookup.reason) for lookup in found] == [("bypass", "index"), ("exact", "repeat")]


def test_in_shadow_mode_nobody_complains_of_what_the_cache_did_not_say():
    with cache_of(shadow=True) as cache:
        ask(cache, "a")
        for n in range(3):
            lookup = ask(cache, f"a {n}")
            assert lookup.kind in ("hit", "exact")
            cache.remember(f"r{n}", lookup)
            assert cache.feedback("", False, response_id=f"r{n}") is False
        assert cache.stats("").entries == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "static", "threshold": 7}, "threshold: found 7, expected a number from 0 to 1"),
        ({"policy": "gptcache", "threshold": float("nan")}, "threshold: found nan"),
        ({"max_temperature": float("nan")}, "max_temperature: found nan"),
        ({"ttl_s": float("inf")}, "ttl_s: found inf"),
        ({"label_timeout_s": None}, "label_timeout_s: found None"),
        ({"feedback_per_minute": -1}, "feedback_per_minute: found -1"),
        ({"tenants": {"a": TenantOverrides(max_entries=0)}}, r"tenants\['a'\].max_entries: found 0, expected"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_the_first_request(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        CacheConfig(**settings)
    assert caught.value.exit_code == 2
