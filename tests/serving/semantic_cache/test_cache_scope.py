"""Which requests are equal, which may be near, and which the cache has no part in."""

import pytest
from angles import ask, cache_of, said

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache import CacheConfig
from jaxstack.serving.semantic_cache.scope import CacheScope


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
        wrong_ones = ({"mode": "maybe"}, {"delta": 0.7}, {"ttl_s": 0}, {"ttl_s": 10**400}, {"ttl_s": 1e999})
        for wrong in (*wrong_ones, {"more": 1}, 3):
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


def request_of(cache, chat, **body):
    return cache.scope.body({"temperature": 0, **body}, tenant="", model="m", chat=chat)


def test_space_counts_where_it_means_something():
    """A stop string of one line break is not one of two; behind a turn of a conversation, neither says anything."""
    with cache_of() as cache:
        talk = [{"role": "user", "content": "a"}]
        for name, one, other in (
            ("stop", ["\n"], ["\n\n"]),
            ("stop", "a", "a "),
            ("guided_choice", ["yes", "no"], ["yes ", "no"]),
            ("guided_regex", "a*", "a* "),
        ):
            first, second = (request_of(cache, True, messages=talk, **{name: value}) for value in (one, other))
            assert first.exact != second.exact, name
            assert first.scope != second.scope, name
        prompts = [request_of(cache, False, prompt=prompt) for prompt in ("The answer is", "The answer is ")]
        assert prompts[0].exact != prompts[1].exact
        spaced = [{"role": "user", "content": "a \n"}]
        assert request_of(cache, True, messages=spaced).exact == request_of(cache, True, messages=talk).exact


def test_what_only_the_other_endpoint_reads_means_nothing():
    with cache_of() as cache:
        talk = [{"role": "user", "content": "hi"}]
        one, two = (request_of(cache, False, prompt=prompt, messages=talk) for prompt in "ab")
        assert (one.text, two.text) == ("a", "b")
        assert one.exact != two.exact
        assert request_of(cache, False, prompt="a", messages=None).text == "a"
        chats = [request_of(cache, True, messages=talk, prompt=prompt) for prompt in "ab"]
        assert chats[0].text == "hi"
        assert chats[0].exact == chats[1].exact


def test_log_probabilities_without_alternatives_are_log_probabilities():
    with cache_of() as cache:
        assert request_of(cache, False, prompt="a", logprobs=0).bypass == "logprobs"
        assert request_of(cache, True, messages=[{"role": "user", "content": "a"}], logprobs=False).bypass is None


def test_a_field_nested_beyond_measure_is_nobodys_mistake():
    deep = []
    for _ in range(5000):
        deep = [deep]
    with cache_of() as cache:
        request = request_of(cache, False, prompt="a", unknown=deep)
        assert request.bypass == "nested"
        assert cache.lookup([request])[0].kind == "bypass"


def test_answers_of_another_revision_are_not_used():
    revisions = ({"revision": "1"}, {"revision": "2"}, {"revision": "1", "revisions": {"adapter": "a"}})
    base, other, adapted = (CacheScope(CacheConfig(**each)) for each in revisions)
    assert base.prompt("a", model="m").exact != other.prompt("a", model="m").exact
    assert base.prompt("a", model="m") == adapted.prompt("a", model="m")
    assert base.prompt("a", model="adapter").scope != adapted.prompt("a", model="adapter").scope
