"""Equal requests at once, from threads and on an event loop: one generation, whoever leaves or fails."""

import asyncio
import functools
import threading

import numpy as np
import pytest
from angles import Angles, ask, cache_of, collect, run, said, speaker

from jaxstack.serving.semantic_cache import CacheConfig, SemanticCache
from jaxstack.serving.semantic_cache.flight import Chunk


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


def test_who_leaves_at_once_leaves_nothing_behind():
    """Before the generation has taken its first step: nobody else may wait for it."""

    async def work():
        with cache_of() as cache:
            request, log = cache.scope.prompt("a"), []
            left = await cache.answer(request, speaker(log))
            await left.aclose()
            again = await cache.answer(request, speaker(log))
            assert again.lookup.kind == "miss"
            assert await collect(again) == "one flight"
            assert log == ["begun"]

    run(work())


def test_nobody_joins_a_generation_that_is_being_taken_down():
    """A client gives up and asks again while its first generation is still ending."""

    async def work():
        with cache_of() as cache:
            request, ended = cache.scope.prompt("a"), asyncio.Event()

            async def dawdler():
                try:
                    yield Chunk("on")
                    await asyncio.Event().wait()
                finally:
                    await ended.wait()

            first = await cache.answer(request, dawdler)
            assert (await anext(first)).text == "on"
            await first.aclose()
            await asyncio.sleep(0.01)
            again = await cache.answer(request, speaker([]))
            assert again.lookup.kind == "miss"
            reading = asyncio.create_task(collect(again))
            await asyncio.sleep(0.01)
            ended.set()
            assert await reading == "one flight"

    run(work())


def test_one_function_may_answer_everybody():
    """Listeners are told apart by themselves, not by what they would generate with."""

    async def work():
        with cache_of() as cache:
            gate = asyncio.Event()
            generate = speaker([], gate=gate)
            first, second = [await cache.answer(cache.scope.prompt("a"), generate) for _ in range(2)]
            reading = asyncio.create_task(collect(second))
            await asyncio.sleep(0.01)
            await first.aclose()
            gate.set()
            assert await reading == "one flight"
            log, gate = [], asyncio.Event()
            generate = speaker(log, fail=1, gate=gate)
            answered = [await cache.answer(cache.scope.prompt("b"), generate) for _ in range(2)]
            gate.set()
            assert await asyncio.gather(*map(collect, answered)) == ["one flight"] * 2
            assert len(log) == 2

    run(work())


def test_an_answer_that_was_whole_is_kept_if_its_client_leaves_at_the_last_word():
    async def work():
        with cache_of() as cache:
            request = cache.scope.prompt("a")

            async def lingering():
                yield Chunk("all of it", "stop", 3, 3)
                await asyncio.Event().wait()

            answered = await cache.answer(request, lingering)
            assert (await anext(answered)).text == "all of it"
            await answered.aclose()
            await asyncio.sleep(0.01)
            assert (await cache.answer(request, speaker([]))).lookup.kind == "exact"

    run(work())


def test_equal_requests_do_not_wait_for_a_slow_embedder_one_after_the_other():
    calls = []

    class Slow(Angles):
        def embed(self, texts):
            calls.append(texts)
            threading.Event().wait(0.3)
            return super().embed(texts)

    async def work():
        with SemanticCache(Slow(), CacheConfig(lookup_timeout_ms=100)) as cache:
            asking = [cache.answer(cache.scope.prompt("a"), speaker([])) for _ in range(8)]
            answered = await asyncio.gather(*asking)
            assert [(a.lookup.kind, a.lookup.reason) for a in answered] == [("bypass", "timeout")] * 8
            assert [await collect(a) for a in answered] == ["one flight"] * 8
            assert calls == [["a"]]
            assert cache.stats("").requests["bypass"] == 8

    run(work())


def test_what_was_begun_before_an_invalidation_is_not_joined_after_it():
    async def work():
        with cache_of() as cache:
            gate, request = asyncio.Event(), cache.scope.prompt("a", model="m")
            first = await cache.answer(request, speaker([], words=("old",), gate=gate))
            cache.invalidate_model("m")
            second = await cache.answer(request, speaker([], words=("new",), gate=gate))
            assert second.lookup.kind == "miss"
            gate.set()
            assert await asyncio.gather(collect(first), collect(second)) == ["old", "new"]
            assert await collect(await cache.answer(request, speaker([]))) == "new"

    run(work())


def searching(cache, before=None, after=None):
    """Calls `before` and `after` around the searches in the only index."""
    (index,) = cache._accounts["t:"].indexes.values()
    search = index.search

    def watched(*given):
        if before is not None:
            before()
        found = search(*given)
        index.search = search
        if after is not None:
            after()
        return found

    index.search = watched


def test_repeats_are_answered_while_a_search_takes_long():
    with cache_of() as cache:
        ask(cache, "a")
        begun, go, found = threading.Event(), threading.Event(), []

        def wait():
            begun.set()
            go.wait(30)

        searching(cache, before=wait)
        near = threading.Thread(target=lambda: found.append(ask(cache, "a 5")))
        near.start()
        assert begun.wait(30)
        repeat = threading.Thread(target=lambda: found.append(cache.repeat(cache.scope.prompt("a"))))
        repeat.start()
        repeat.join(10)
        go.set()
        near.join()
        repeat.join()
        assert [lookup.kind for lookup in found] == ["exact", "hit"]


def test_what_goes_between_search_and_decision_answers_nobody():
    for gone in (1, 2):
        with cache_of(max_entries=2) as cache:
            ask(cache, "a")
            ask(cache, "a 60", "other")
            searching(cache, after=functools.partial(cache.invalidate, "", entry_id=gone))
            lookup = ask(cache, "a 5")
            assert (lookup.kind, said(lookup)) == (("miss", None) if gone == 1 else ("hit", "yes"))
