"""Lookups through the public calls: tiers, what is learned, and requests that ask for something of their own."""

import numpy as np
import pytest
from angles import Angles, ask, cache_of, said

from jaxstack.serving.semantic_cache import CacheConfig, SemanticCache


def test_a_repeat_is_exact_and_a_near_request_is_a_hit():
    with cache_of() as cache:
        assert ask(cache, "a").kind == "miss"
        assert (ask(cache, "a").kind, said(ask(cache, "a "))) == ("exact", "yes")
        near = ask(cache, "a 10")
        assert (near.kind, said(near)) == ("hit", "yes")
        assert near.similarity == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)
        assert ask(cache, "a 30", "no").kind == "miss"
        assert said(ask(cache, "a 31")) == "no"
        # A hit has put nothing in, so it is decided anew each time, and counted.
        assert ask(cache, "a 10").kind == "hit"
        stats = cache.stats("")
        assert stats.requests == {"exact": 2, "hit": 3, "coalesced": 0, "explore": 0, "miss": 2, "bypass": 0}
        assert stats.entries == 2
        assert stats.saved_s == pytest.approx(5 * 0.5)


def test_the_cache_learns_whether_near_requests_have_the_same_answer():
    with cache_of(policy="bayes", delta=0.1, seed=3) as cache:
        ask(cache, "a")
        for n in range(200):
            ask(cache, f"a {n % 7 + 1} {n}")  # another text each time, a few degrees away
            cache.flush()
        stats = cache.stats("")
        assert stats.requests["hit"] > 120
        assert stats.labels == stats.requests["explore"]
        assert stats.entries == 1 + stats.requests["explore"]  # for the exact tier; none of them answers others
        for n in range(200):
            ask(cache, f"b {n % 7 + 1} {n}", answer=f"answer {n}")
            cache.flush()
        after = cache.stats("")
        wrong = after.requests["hit"] - stats.requests["hit"]
        assert wrong / 400 <= 0.1  # of all requests
        assert after.bound >= after.error


class Many(Angles):
    """ "NUMBER ANYTHING": forty directions; what comes behind moves nothing."""

    dim = 40

    def embed(self, texts):
        return np.eye(40, dtype=np.float32)[[int(text.split()[0]) for text in texts]]


def test_when_all_answers_change_it_answers_less_and_says_so():
    """Right for long, then every answer is another: hits cease, the reason is told, and the bound holds throughout."""
    config = CacheConfig(delta=0.02, seed=1, lookup_timeout_ms=30_000)
    with SemanticCache(Many(), config) as cache:
        allowed, wrong = [], 0
        for n in range(1200):
            lookup = ask(cache, f"{n % 40} {n}", answer=f"old {n % 40}" if n < 800 else f"new {n}")
            cache.flush()
            wrong += lookup.kind == "hit" and n >= 800
            stats = cache.stats("")
            allowed.append(stats.delta_eff)
            assert (stats.delta_eff == 0) == (stats.stopped is not None)
            assert n >= 800 or stats.stopped is None
        assert allowed[799] == 0.02
        assert min(allowed) < 0.5 * 0.02
        assert stats.requests["hit"] > 400
        assert wrong / 1200 <= stats.bound
        assert wrong <= 100  # of 400: what it took to notice


def test_one_hot_vector_with_answers_by_chance_stays_within_delta():
    """All texts have one vector; no similarity tells which of two answers is right."""
    with cache_of(policy="bayes", delta=0.05, seed=2) as cache:
        rng, wrong = np.random.default_rng(0), 0
        for n in range(1500):
            right = "yes" if rng.random() < 0.8 else "no"
            lookup = ask(cache, f"a 0 {n}", answer=right)
            cache.flush()
            wrong += said(lookup) not in (None, right)
        assert wrong / 1500 <= 0.05 + 3 * (0.05 / 1500) ** 0.5


def test_a_batch_is_looked_up_as_its_requests_one_by_one():
    fields = ("kind", "reason", "entry_id", "similarity", "alpha", "tau", "u")
    with cache_of(policy="bayes", seed=7) as one, cache_of(policy="bayes", seed=7) as other:
        for cache in (one, other):
            for n in range(60):
                ask(cache, f"{'abc'[n % 3]} {n % 5} {n}", answer="abc"[n % 3], tenant=f"t{n % 2}")
                cache.flush()
        texts = [(f"{'abcd'[n % 4]} {n % 6} new {n}", f"t{n % 3}") for n in range(40)] + [("a 0 0", "t0")]
        requests = [one.scope.prompt(text, tenant=tenant) for text, tenant in texts]
        whole = one.lookup(requests, 5.0)
        single = [other.lookup([request], 5.0)[0] for request in requests]
        assert {lookup.kind for lookup in whole} >= {"exact", "hit", "explore", "miss"}
        for a, b in zip(whole, single):
            assert [getattr(a, f) for f in fields] == [getattr(b, f) for f in fields]


def test_a_request_may_ask_for_fewer_errors_and_never_for_more():
    with cache_of(policy="bayes", delta=0.05, seed=7) as cache:
        for n in range(80):
            ask(cache, f"a {n % 40} {n}", answer="yes" if n % 40 < 20 else "no")
            cache.flush()
        taus = {}
        for delta in (None, 0.5, 0.05, 0.001):
            found = cache.lookup([cache.scope.prompt(f"a 18 {delta}", cache=delta and {"delta": delta})])[0]
            taus[delta] = found.tau
            cache.abandon(found)
        assert taus[None] == pytest.approx(taus[0.5], abs=0.02)
        assert taus[0.001] > taus[0.05]


def test_an_exact_repeat_is_never_a_label():
    with cache_of(policy="bayes", delta=0.1) as cache:
        ask(cache, "a")
        for n in range(20):
            ask(cache, f"a 5 {n}")
        cache.flush()
        labels = cache.stats("").labels
        explored = [n for n in range(20) if cache.repeat(cache.scope.prompt(f"a 5 {n}")) is not None]
        assert explored
        for n in explored:
            assert ask(cache, f"a 5 {n}", answer="another").kind == "exact"
        cache.flush()
        assert cache.stats("").labels == labels


def test_shadow_mode_answers_nothing_and_says_what_it_would_have():
    with cache_of(policy="bayes", seed=5) as plain, cache_of(policy="bayes", seed=5, shadow=True) as shadow:
        rng = np.random.default_rng(0)
        for n in range(150):
            text = f"{'abc'[n % 3]} {int(rng.integers(0, 8))} {n}"
            one, other = ask(plain, text), ask(shadow, text)
            assert (one.kind, one.tau, one.u) == (other.kind, other.tau, other.u)
            assert other.response is None
            plain.flush(), shadow.flush()
        a, b = plain.stats(""), shadow.stats("")
        assert a.requests == b.requests
        assert a.requests["hit"] == b.shadow_checked > 0
        assert b.shadow_wrong == 0
