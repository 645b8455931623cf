"""Thinking is told apart from the answer, however the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxstack.models.embedded import embedded_model
from jaxstack.models.tokenizer import byte_tokenizer, load_tokenizer
from jaxstack.serving.reasoning import ReasoningReader, longest_overlap, reasoning_format, thinking_begun


def read(pieces: list[str], begun: bool) -> tuple[str, str]:
    reader = ReasoningReader(begun=begun)
    parts = [*(reader.push(piece) for piece in pieces), reader.finish()]
    return "".join(reasoning for reasoning, _ in parts), "".join(content for _, content in parts)


@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nfirst\n then\n</think>\n\nanswer ", False, ("first\n then", "answer ")),
        ("\n <think>a</think>b", False, ("a", "b")),
        ("thought </think> said", True, ("thought", "said")),
        ("no thinking, just <think>", False, ("", "no thinking, just <think>")),
        ("a</think>b</think>c<think>", True, ("a", "b</think>c<think>")),
        ("cut short", True, ("cut short", "")),
        ("cut in a marker </thi", True, ("cut in a marker </thi", "")),
        ("<thi", False, ("", "<thi")),
        ("<think></think>only said", False, ("", "only said")),
        ("a < b </ c </think>d", True, ("a < b </ c", "d")),
        ("  ", False, ("", "  ")),
        (" \n ", True, ("", "")),
        ("", False, ("", "")),
    ],
)
def test_reading(text: str, begun: bool, expected: tuple[str, str]) -> None:
    assert read([text], begun) == expected
    assert read(list(text), begun) == expected


PARTS = st.sampled_from(["<think>", "</think>", "<", "</", "think>", " ", "\n", "a", "bc", "</thi"])


@given(st.lists(PARTS, max_size=8), st.booleans(), st.data())
def test_any_cut_gives_the_same(parts: list[str], begun: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    whole = read([text], begun)
    assert read(pieces, begun) == whole
    # Nothing is lost but the first pair of markers and blanks around them.
    assert "".join("".join(whole).split()) == "".join(_without_markers(text, begun).split())


def _without_markers(text: str, begun: bool) -> str:
    if not begun:
        if not text.lstrip().startswith("<think>"):
            return text
        text = text.lstrip()[len("<think>") :]
    return text.replace("</think>", "", 1)


@given(st.text("ab", max_size=8), st.text("ab", min_size=1, max_size=5))
def test_overlap(text: str, marker: str) -> None:
    lengths = [n for n in range(len(marker)) if text.endswith(marker[:n])]
    assert longest_overlap(text, marker) == max(lengths)


def test_what_marks_thinking() -> None:
    assert reasoning_format(byte_tokenizer()) is None
    assert reasoning_format(load_tokenizer(embedded_model())) == "think"


def test_whether_the_prompt_has_begun_it() -> None:
    user = [{"role": "user", "content": "what is <think>"}]
    assert thinking_begun("... <think>\n", user, False)
    assert not thinking_begun("what is <think> assistant:", user, False)
    assert not thinking_begun("<think>\n\n</think>\n\n", user, False)
    for said, begun in (("<think> well", True), ("<think> well </think> so", False), ("so", False)):
        assert thinking_begun("", [*user, {"role": "assistant", "content": said}], True) == begun
