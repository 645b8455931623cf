"""Incremental text against the whole text, for each kind of token pipeline, with and without stop strings."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from jaxstack.engine.detokenise import IncrementalDetokenizer
from jaxstack.models.tokenizer import Tokenizer, byte_tokenizer

BYTES = byte_tokenizer()


def sentencepiece_like() -> Tokenizer:
    """Words with the sentencepiece blank, and byte fallback, decoded as Llama 2 and Mistral do."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "▁a", "the", "é", "."]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    pipeline = tokenizers.Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    pipeline.decoder = decoders.Sequence(steps)
    pipeline.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(pipeline)


def word_level() -> Tokenizer:
    pipeline = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<e>": 0, "a": 1, "bc": 2, "7": 3}, unk_token="<e>"))
    pipeline.add_special_tokens(["<e>"])
    return Tokenizer(pipeline)


SENTENCEPIECE, WORDS = sentencepiece_like(), word_level()
# Bytes of characters of two, three and four bytes, whole and broken, and an id outside the vocabulary.
BYTE_IDS = st.one_of(
    st.integers(0, 262), st.sampled_from(list("aé€😀".encode())), st.sampled_from([0xE2, 0x82, 0xF0, 0x9F, 0x80])
)


def pieces(detokenizer: IncrementalDetokenizer, ids: list[int], chunk: int) -> list[str]:
    return [detokenizer.push(ids[i : i + chunk]) for i in range(0, len(ids), chunk)] + [detokenizer.finish()]


def cut(text: str, stop: list[str], include_stop: bool) -> tuple[str, str | None]:
    """`text` before the stop string that is complete first, the longest if several are."""
    for end in range(1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return (text[:end] if include_stop else text[: end - len(longest)]), longest
    return text, None


@given(st.lists(BYTE_IDS, max_size=40), st.integers(1, 7), st.booleans())
def test_byte_level_pieces_are_the_whole_text(ids: list[int], chunk: int, skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(BYTES, skip_special_tokens=skip)
    shown = pieces(detokenizer, ids, chunk)
    assert "".join(shown) == BYTES.decode(ids, skip_special_tokens=skip)
    assert detokenizer.finish() == ""


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 5), st.booleans())
def test_word_pieces_are_the_whole_text(ids: list[int], chunk: int, skip: bool) -> None:
    shown = pieces(IncrementalDetokenizer(WORDS, skip_special_tokens=skip), ids, chunk)
    assert "".join(shown) == WORDS.decode(ids, skip_special_tokens=skip)


WHOLE = st.sampled_from(["▁", "▁the", "▁a", "the", ".", "</s>", "é", "€", "😀", "\n"])


@given(st.lists(WHOLE, max_size=20), st.integers(1, 7), st.booleans())
def test_byte_fallback_pieces_are_the_whole_text(words: list[str], chunk: int, skip: bool) -> None:
    ids = []
    for word in words:
        known = SENTENCEPIECE.token_to_id(word)
        ids += [known] if known is not None else [SENTENCEPIECE.token_to_id(f"<0x{b:02X}>") for b in word.encode()]
    # The pipeline strips a blank in front of the text; a blank byte in front would be one too, and is not drawn here.
    shown = pieces(IncrementalDetokenizer(SENTENCEPIECE, skip_special_tokens=skip), ids, chunk)
    assert "".join(shown) == SENTENCEPIECE.decode(ids, skip_special_tokens=skip)


def test_byte_fallback_keeps_the_valid_part_of_a_broken_run() -> None:
    ids = [SENTENCEPIECE.token_to_id(f"<0x{b:02X}>") for b in "€".encode() + b"\x80"]
    shown = pieces(IncrementalDetokenizer(SENTENCEPIECE), ids, 1)
    assert shown[:3] == ["", "", "€"] and "".join(shown) == "€\ufffd"


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=300)
@given(st.text("ab\n", max_size=30), STOPS, st.integers(1, 5), st.booleans())
def test_stop_strings(text: str, stop: list[str], chunk: int, include_stop: bool) -> None:
    detokenizer = IncrementalDetokenizer(BYTES, stop, include_stop)
    ids, shown = list(text.encode()), ""
    for i in range(0, len(ids), chunk):
        shown += detokenizer.push(ids[i : i + chunk])
        so_far = text[: i + chunk]
        if detokenizer.stopped is None:
            # All is shown but the longest end that may become a stop string.
            held = max((n for s in stop for n in range(len(s)) if so_far.endswith(s[:n])), default=0)
            assert shown == so_far[: len(so_far) - held]
    assert (shown + detokenizer.finish(), detokenizer.stopped) == cut(text, stop, include_stop)


def test_a_character_is_shown_when_its_last_byte_comes() -> None:
    shown = pieces(IncrementalDetokenizer(BYTES), list("é😀".encode()), 1)
    assert shown == ["", "é", "", "", "", "😀", ""]


def test_a_stop_string_across_tokens_is_never_half_shown() -> None:
    detokenizer = IncrementalDetokenizer(BYTES, ["END"])
    assert [detokenizer.push([byte]) for byte in b"xEENDy"] == ["x", "", "E", "", "", ""]
    assert detokenizer.stopped == "END" and detokenizer.finish() == ""


@pytest.mark.parametrize("length", [10_000])
def test_bytes_that_never_make_a_character_are_not_held(length: int) -> None:
    detokenizer = IncrementalDetokenizer(BYTES)
    assert detokenizer.push([0x80] * length) == "\ufffd" * length
