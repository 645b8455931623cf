"""The cache through its public calls: tiers, tenants, labels, limits, threads; with texts whose nearness is known."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache import CacheConfig, CachedResponse, SemanticCache, TenantOverrides
from jaxstack.serving.semantic_cache.flight import Chunk
from jaxstack.serving.semantic_cache.judge import CascadeJudge, ExactJson, NormalisedText, calibrate

DIM = 8


class Angles:
    """ "WORD DEGREES": words are orthogonal directions, degrees turn away from them. "nan" has no vector."""

    id, dim = "angles", DIM

    def embed(self, texts):
        rows = np.zeros((len(texts), DIM), np.float32)
        for row, text in zip(rows, texts):
            word, _, degrees = text.partition(" ")
            if word == "nan":
                row[:] = np.nan
                continue
            angle = np.deg2rad(float(degrees.split()[0]) if degrees else 0.0)
            row[sum(map(ord, word)) % (DIM - 1)], row[DIM - 1] = np.cos(angle), np.sin(angle)
        return rows


def cache_of(**settings):
    settings = {"delta": 0.1, "policy": "static", "threshold": 0.95, "lookup_timeout_ms": 30_000, **settings}
    return SemanticCache(Angles(), CacheConfig(**settings))


def ask(into, text, answer="yes", tenant="", now_s=None, **fields):
    """The lookup of one request, which is answered if the cache does not."""
    request = into.scope.prompt(text, tenant=tenant, **fields)
    lookup = into.lookup([request], now_s)[0]
    if lookup.response is None:
        into.complete(lookup, CachedResponse(answer, generation_s=0.5), now_s)
    return lookup


def said(lookup):
    return None if lookup.response is None else lookup.response.text


# --------------------------------------------------------------------------------------------------------------- tiers


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


def test_what_must_match_exactly_is_never_crossed():
    with cache_of() as cache:
        ask(cache, "a", model="m", system="be brief")
        for fields in (
            {"model": "other", "system": "be brief"},
            {"model": "m", "system": "be long"},
            {"model": "m"},
            {"model": "m", "system": "be brief", "sampling": {"max_tokens": 5}},
            {"model": "m", "system": "be brief", "sampling": {"seed": 1}},
            {"model": "m", "system": "be brief", "sampling": {"response_format": {"type": "json_object"}}},
        ):
            assert ask(cache, "a", **fields).kind == "miss", fields
        assert ask(cache, "a 1", model="m", system="be brief", sampling={"n": 1, "stream": True}).kind == "hit"


def test_conversations_match_in_their_last_turn_only():
    turn = {"role": "user", "content": "first"}, {"role": "assistant", "content": "so"}
    with cache_of() as cache, cache_of(embed_history=True) as loose:
        body = {"messages": [*turn, {"role": "user", "content": "a"}], "temperature": 0}
        request = cache.scope.body(body, tenant="", model="m")
        other = cache.scope.body({**body, "messages": [*turn, {"role": "user", "content": "b"}]}, tenant="", model="m")
        elsewhere = cache.scope.body({**body, "messages": body["messages"][1:]}, tenant="", model="m")
        parts = [{"type": "text", "text": "a"}]
        same = cache.scope.body({**body, "messages": [*turn, {"role": "user", "content": parts}]}, tenant="", model="m")
        assert request.scope == other.scope != elsewhere.scope
        assert request.exact == same.exact != other.exact
        embedded = loose.scope.body(body, tenant="", model="m")
        assert embedded.text == "user: first\nassistant: so\na"


def test_what_is_not_one_answer_among_equals_is_passed_over():
    with cache_of() as cache:
        for fields in ({"n": 2}, {"logprobs": True}, {"temperature": 0.9}, {"tools": [{"type": "function"}]}):
            body = {"messages": [{"role": "user", "content": "a"}], "temperature": 0, **fields}
            lookup = cache.lookup([cache.scope.body(body, tenant="", model="m")])[0]
            assert lookup.kind == "bypass", fields
            assert lookup.reason == next(iter(fields))
        opted = cache.scope.body(
            {**body, "tools": None, "temperature": 0.9, "cache": {"mode": "on"}}, tenant="", model="m"
        )
        assert opted.bypass is None
        for wrong in ({"mode": "maybe"}, {"delta": 0.7}, {"ttl_s": 0}, {"more": 1}, 3):
            with pytest.raises(UserError, match="cache"):
                cache.scope.body({**body, "cache": wrong}, tenant="", model="m")


def test_directives_of_a_request():
    with cache_of() as cache:
        ask(cache, "a")
        assert ask(cache, "a", cache={"mode": "off"}).kind == "bypass"
        assert ask(cache, "a", answer="new", cache={"mode": "refresh"}).kind == "miss"
        assert said(ask(cache, "a")) == "new"
        assert said(ask(cache, "a 1")) == "new"
        ask(cache, "b", cache={"mode": "read"})
        assert ask(cache, "b").kind == "miss"
        ask(cache, "c", now_s=0.0, cache={"ttl_s": 5})
        assert ask(cache, "c", now_s=4.0).kind == "exact"
        assert ask(cache, "c 1", now_s=5.0).kind == "miss"


# ----------------------------------------------------------------------------------------------------------- tenants

_CALLS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "ask", "ask", "feedback", "invalidate", "entry", "stats", "repeat"]),
        st.sampled_from(["red", "blue", "t:red", ""]),
        st.sampled_from(["a", "b"]),
        st.integers(0, 25),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(calls=_CALLS, policy=st.sampled_from(["static", "bayes", "vcache"]))
def test_tenants_never_see_each_others_answers(calls, policy):
    """Whatever is called, whatever comes back is of the tenant who calls, and nobody removes another's."""
    with cache_of(policy=policy, threshold=0.5, delta=0.5, max_entries=7) as cache:
        numbers = {}
        for call, tenant, word, degrees in calls:
            text = f"{word} {degrees}"
            if call == "ask":
                lookup = ask(cache, text, answer=f"secret of {tenant}", tenant=tenant)
                assert said(lookup) in (None, f"secret of {tenant}")
                assert lookup.candidate is None or lookup.candidate.text == f"secret of {tenant}"
                cache.remember(text, lookup)
                if lookup.entry_id is not None:
                    assert numbers.setdefault(lookup.entry_id, tenant) == tenant
            elif call == "repeat":
                found = cache.repeat(cache.scope.prompt(text, tenant=tenant))
                assert found is None or said(found) == f"secret of {tenant}"
            elif call == "entry":
                for number in range(1, 60):
                    entry = cache.entry(tenant, number)
                    assert entry is None or entry.response.text == f"secret of {tenant}"
            elif call == "feedback":
                for number, owner in numbers.items():
                    if owner != tenant:
                        assert cache.feedback(tenant, False, entry_id=number) is not True
                cache.feedback(tenant, False, response_id=text)
            elif call == "invalidate":
                others = {t: cache.stats(t).entries for t in ("red", "blue", "t:red", "") if t != tenant}
                cache.invalidate(tenant, everything=True)
                assert cache.stats(tenant).entries == 0
                assert {t: cache.stats(t).entries for t in others} == others
            else:
                assert cache.stats(None).entries <= 7


def test_groups_share_and_nobody_else():
    tenants = {"a": TenantOverrides(share_group="g"), "b": TenantOverrides(share_group="g", delta=0.01)}
    with cache_of(tenants=tenants) as cache:
        ask(cache, "a", tenant="a")
        assert ask(cache, "a", tenant="b").kind == "exact"
        for stranger in ("g", "g:g", "", "c"):
            assert ask(cache, "a", tenant=stranger).kind == "miss"
        assert cache.stats("a").delta == cache.stats("b").delta == 0.01  # the strictest
        assert cache.stats("c").delta == 0.1


def test_a_tenant_that_floods_pushes_only_itself_out():
    with cache_of(max_entries=20, tenants={"small": TenantOverrides(max_entries=3)}) as cache:
        for n in range(5):
            ask(cache, f"a {n * 20}", tenant="quiet")
        for n in range(50):
            ask(cache, f"b {n} {n}", tenant="loud", sampling={"seed": n})
            ask(cache, f"c {n} {n}", tenant="small", sampling={"seed": n})
        assert cache.stats("quiet").entries == 5
        assert cache.stats("small").entries == 3
        assert cache.stats(None).entries == 20


# ------------------------------------------------------------------------------------------------ limits and failures


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


# ------------------------------------------------------------------------------------------------------- concurrency


def test_64_threads_on_one_cache():
    """Everybody gets an answer to what was asked, and every request is counted once."""
    with cache_of(max_entries=40, threshold=0.999) as cache:
        calls, wrong = [], []

        def generate(prompt):
            calls.append(prompt)
            return f"of {prompt}"

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(25):
                text = f"{'abcdefg'[rng.integers(7)]} {10 * rng.integers(9)}"
                tenant = f"t{rng.integers(2)}"
                if cache.ask(text, generate, tenant=tenant) != f"of {text}":
                    wrong.append(text)
                if rng.random() < 0.05:
                    cache.invalidate(tenant, prompt_prefix=text)
                    cache.stats(None)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        counts = cache.stats(None).requests
        assert sum(counts.values()) == 64 * 25
        assert counts["miss"] == len(calls)
        assert cache.stats(None).entries <= 40


def test_equal_prompts_from_many_threads_are_generated_once():
    with cache_of() as cache:
        calls, go = [], threading.Event()

        def generate(prompt):
            calls.append(prompt)
            go.wait(10)
            return "one"

        found = []
        threads = [threading.Thread(target=lambda: found.append(cache.ask("a", generate))) for _ in range(16)]
        for thread in threads:
            thread.start()
        go.set()
        for thread in threads:
            thread.join()
        assert found == ["one"] * 16
        assert len(calls) == 1


def run(work):
    return asyncio.run(asyncio.wait_for(work, 60))


async def collect(answered):
    async with contextlib.aclosing(answered):
        return "".join([chunk.text async for chunk in answered])


def speaker(log, words=("on", "e ", "flight"), fail=0, gate=None):
    async def generate():
        log.append("begun")
        if len(log) <= fail:
            if gate is not None:
                await gate.wait()
            raise RuntimeError("lost")
        for n, word in enumerate(words):
            if gate is not None:
                await gate.wait()
            yield Chunk(word, "stop" if n + 1 == len(words) else None, 3, n + 1)

    return generate


def test_50_equal_requests_at_once_are_one_generation():
    async def work():
        with cache_of() as cache:
            log, gate = [], asyncio.Event()
            request = cache.scope.prompt("a")
            asking = [asyncio.create_task(cache.answer(request, speaker(log, gate=gate))) for _ in range(50)]
            answered = await asyncio.gather(*asking)
            kinds = [a.lookup.kind for a in answered]
            assert kinds.count("miss") == 1
            assert kinds.count("coalesced") == 49
            reading = [asyncio.create_task(collect(a)) for a in answered]
            await asyncio.sleep(0)
            gate.set()
            assert set(await asyncio.gather(*reading)) == {"one flight"}
            assert log == ["begun"]
            again = await cache.answer(request, speaker(log))
            assert again.lookup.kind == "exact"
            assert await collect(again) == "one flight"

    run(work())


def test_the_first_to_ask_may_leave():
    async def work():
        with cache_of() as cache:
            log, gate = [], asyncio.Event()
            request = cache.scope.prompt("a")
            first = await cache.answer(request, speaker(log, gate=gate))
            second = await cache.answer(request, speaker(log, gate=gate))
            reading = [asyncio.create_task(collect(a)) for a in (first, second)]
            await asyncio.sleep(0.01)
            reading[0].cancel()
            await asyncio.gather(reading[0], return_exceptions=True)
            gate.set()
            assert await reading[1] == "one flight"
            # All leave: the generation ends, and nothing of it is kept.
            gate.clear()
            other = cache.scope.prompt("b")
            alone = asyncio.create_task(collect(await cache.answer(other, speaker(log, gate=gate))))
            await asyncio.sleep(0.01)
            alone.cancel()
            await asyncio.gather(alone, return_exceptions=True)
            await asyncio.sleep(0.01)
            assert cache.repeat(other) is None
            assert (await cache.answer(other, speaker(log))).lookup.kind == "miss"

    run(work())


def test_if_the_generation_fails_somebody_else_tries_once():
    async def work():
        with cache_of() as cache:
            for failures, generations in ((1, 2), (2, 2)):
                log, gate = [], asyncio.Event()
                request = cache.scope.prompt(f"a {failures * 40}")
                answered = [await cache.answer(request, speaker(log, fail=failures, gate=gate)) for _ in range(4)]
                gate.set()
                found = await asyncio.gather(*map(collect, answered), return_exceptions=True)
                if failures == 1:
                    assert found == ["one flight"] * 4
                else:
                    assert all(isinstance(error, RuntimeError) for error in found)
                assert len(log) == generations
            alone = await cache.answer(cache.scope.prompt("b"), speaker([], fail=9))
            with pytest.raises(RuntimeError, match="lost"):
                await collect(alone)

    run(work())


def test_equal_requests_near_an_entry_have_a_coin_each():
    async def work():
        with cache_of() as cache:
            ask(cache, "a")
            asking = [cache.answer(cache.scope.prompt("a 1"), speaker([])) for _ in range(8)]
            answered = await asyncio.gather(*asking)
            assert [a.lookup.kind for a in answered] == ["hit"] * 8
            assert await collect(answered[0]) == "yes"

    run(work())


def test_a_replay_is_the_text_in_small_pieces():
    text = "  Two\n\nwords " + "and more " * 30 + "x" * 200 + "\t"

    async def work():
        with cache_of() as cache:
            ask(cache, "a", text)
            answered = await cache.answer(cache.scope.prompt("a"), speaker([]))
            chunks = [chunk async for chunk in answered]
            assert "".join(chunk.text for chunk in chunks) == text
            assert max(len(chunk.text) for chunk in chunks) <= 48
            assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
            assert chunks[-1].finish_reason == "stop"

    run(work())


# ------------------------------------------------------------------------------------------------------------ judges


def test_judges():
    plain = NormalisedText()
    assert plain.same("", "The answer is 1,000.0!", "the  answer is 1000")
    assert not plain.same("", "it is 3.5", "it is 35")
    assert not plain.same("", "it is -3", "it is 3")
    assert ExactJson().same("", '{"a": 1, "b": 2}', '{"b":2,"a":1.0}')
    assert ExactJson().same("", "{", "{}") is None
    assert CascadeJudge(plain, ExactJson()).same("", "[1, 2]", "[1,2]")
    assert CascadeJudge(plain, ExactJson()).same("", "no json", "none") is None


def test_a_model_that_disagrees_with_itself_sets_what_delta_can_be():
    answers = iter(["a", "a", "a", "b"] * 5)
    found = calibrate(NormalisedText(), lambda prompt: next(answers), ["p", "q"] * 5)
    assert (found.share, found.pairs) == (0.5, 10)
    found.check(0.5)
    with pytest.raises(UserError, match=r"0\.02, expected at least 0\.5"):
        found.check(0.02)
