"""Keys of prefixes: as many in common as two prompts begin alike, and few of them however long the prompt."""

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from jaxstack.serving.prefix_keys import keys_of_body, keys_of_text, keys_of_tokens, prompt_text


def common(a: tuple, b: tuple) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@given(st.binary(max_size=300), st.binary(max_size=300), st.binary(max_size=300))
def test_common_keys_are_the_chunks_of_the_common_beginning(start: bytes, one: bytes, other: bytes) -> None:
    a, b = keys_of_text(start + one), keys_of_text(start + other)
    alike = common(tuple(start + one), tuple(start + other))  # type: ignore[arg-type]
    assert common(a.keys, b.keys) == alike // 64
    assert a.ends == tuple(range(64, len(start + one) + 1, 64)) and a.length == len(start + one)


@given(st.lists(st.integers(0, 2**31 - 1), max_size=50), st.lists(st.integers(0, 3), max_size=50), st.integers(1, 9))
def test_pages_of_tokens(start: list[int], rest: list[int], page: int) -> None:
    a, b = keys_of_tokens(start + rest, page), keys_of_tokens(start, page)
    assert common(a.keys, b.keys) == len(start) // page
    assert a.ends == tuple(range(page, len(start + rest) + 1, page))
    assert not set(keys_of_tokens(start, page, b"other").keys) & set(b.keys)


def test_a_long_prompt_has_few_keys_and_every_chunk_is_small_against_what_is_before_it() -> None:
    keys, ends, length = keys_of_text(bytes(4_000_000))
    assert length == 4_000_000 and len(keys) == len(set(keys)) < 2100
    assert all(b - a <= max(64, a / 100) for a, b in itertools.pairwise(ends))
    assert length - ends[-1] < length / 100


def test_the_prompt_of_every_kind_of_body() -> None:
    say = {"role": "user", "content": "hello"}
    parts = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    assert prompt_text({"prompt": "hé"}) == prompt_text({"prompt": ["hé", "x"]}) == "hé".encode()
    assert prompt_text({"input": "a"}) == b"a"
    assert prompt_text({"prompt": [1, 2]}) == prompt_text({"prompt": [[1, 2], [3]]}) == b"\1\0\0\0\2\0\0\0"
    assert prompt_text({"messages": [say]}) == prompt_text({"messages": [parts]})
    assert b"hello" in prompt_text({"messages": [say]})
    # Who said it, and what tools there are, is part of it.
    assert prompt_text({"messages": [say]}) != prompt_text({"messages": [{**say, "role": "assistant"}]})
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert prompt_text({"messages": [say], "tools": tools}).startswith(
        json.dumps(tools, separators=(",", ":")).encode()
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert b'"id":"1"' in prompt_text({"messages": [say, call]})
    for model in ("a", "b"):
        assert len(keys_of_body({"model": model, "prompt": "x" * 640}).keys) == 10
    assert (
        keys_of_body({"model": "a", "prompt": "x" * 64}).keys != keys_of_body({"model": "b", "prompt": "x" * 64}).keys
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner)
        ),
        max_leaves=8,
    ),
    st.sampled_from(["prompt", "messages", "input", "model", "tools"]),
)
def test_no_body_is_too_strange(content: object, field: str) -> None:
    assert keys_of_body({field: content, "prompt" if field != "prompt" else "x": "y"}).length >= 0
