"""A thought as steps and back, and the keywords of reasoning in it.

A step is a paragraph (arXiv 2502.07374 asks its teacher for steps "separated with '\\n\\n'"), or what lies between
two sentences that open with a keyword. Texts of a word-level tokenizer, where a blank line is a word among spaces
(`a \\n\\n b \\n\\n`), keep their form: what stood between two steps stands there again.
"""

import itertools
import re
from collections.abc import Sequence
from typing import Literal

from jaxstack.runtime.errors import UserError

Splitter = Literal["paragraph", "keyword"]

KEYWORDS = (
    "let me double-check",
    "let me verify",
    "let me recheck",
    "on second thought",
    "another approach",
    "alternatively",
    "hold on",
    "maybe",
    "wait",
    "hmm",
    "but",
)
"""Phrases that mark reflection, in lower case; a longer one stands before those that it contains."""

_KEYWORD = re.compile(r"(?<![\w-])(?:" + "|".join(re.escape(k) for k in KEYWORDS) + r")(?![\w-])", re.IGNORECASE)
_BLANK = re.compile(r"[^\S\n]*\n[^\S\n]*\n\s*")
# White space behind the end of a sentence. A point inside a number has none behind it; "... let" goes on.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s++(?![a-z])|\s*\n\s*")
# A paragraph of formulas only: displayed ($$...$$, \[...\]), or signs and digits with no word of three letters.
_DISPLAYED = re.compile(r"\s*(?:\$\$.*\$\$|\\\[.*\\\])\s*", re.DOTALL)


def split_steps(thought: str, *, splitter: Splitter = "paragraph", merge_math: bool = False) -> list[str]:
    """The steps of a thought, stripped; empty ones are dropped.

    Args:
      thought: what stands between the tags of a response.
      splitter: "paragraph": at blank lines. "keyword": before each sentence that opens with one of `KEYWORDS`.
      merge_math: a paragraph that is only a formula belongs to the one before.

    Raises:
      UserError: unknown splitter.
    """
    if splitter == "keyword":
        return _split_at_keywords(thought)
    if splitter != "paragraph":
        raise UserError(f"splitter={splitter!r}: expected paragraph or keyword")
    steps: list[str] = []
    for paragraph in _BLANK.split(thought):
        text = paragraph.strip()
        if not text:
            continue
        if merge_math and steps and _is_formula(text):
            steps[-1] += "\n\n" + text
        else:
            steps.append(text)
    return steps


def join_steps(steps: Sequence[str], *, like: str = "", splitter: Splitter = "paragraph") -> str:
    """Steps as one thought; no steps are an empty one.

    Args:
      like: a thought whose opening and closing white space and separator (`\\n\\n` bare, or a word among spaces) are
        used.
      splitter: as the steps were split: paragraphs are joined by a blank line, keyword segments by a space.
    """
    if not steps:
        return ""
    opening, ending = like[: len(like) - len(like.lstrip())], like[len(like.rstrip()) :]
    separator = " "
    if splitter == "paragraph":
        found = _BLANK.search(like.strip())
        separator = found.group() if found else "\n\n"
        if not found and "\n\n" in ending:  # one step, of a word-level text
            separator = ending.rstrip(" ") + " " * (len(ending) - len(ending.lstrip(" ")))
    return opening + separator.join(steps) + ending


def split_response(text: str, *, end: str = "</think>") -> tuple[str, str]:
    """(thought, the rest from the end tag on) of a response; put together they are the text, byte for byte.

    Raises:
      UserError: the tag is missing or stands there twice.
    """
    if text.count(end) != 1:
        found = f"{text.count(end)} times" if end in text else "none"
        raise UserError(f"response {text[:40]!r}...: found {end} {found}, expected it once, after the thought")
    thought, _, solution = text.partition(end)
    return thought, end + solution


def keyword_spans(text: str) -> list[tuple[int, int]]:
    """Where keywords stand, as `[begin, end)` of characters: whole words in any case, from left to right."""
    return [match.span() for match in _KEYWORD.finditer(text)]


def sentences(text: str) -> list[str]:
    """The text cut behind each sentence's end, white space included: joined they are the text."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    cuts = [0, *(end for end in ends if end < len(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]


def _split_at_keywords(thought: str) -> list[str]:
    steps: list[str] = []
    for sentence in sentences(thought):
        if steps and not _KEYWORD.match(sentence):
            steps[-1] += sentence
        elif sentence.strip():
            steps.append(sentence)
    return [step.strip() for step in steps]


def _is_formula(text: str) -> bool:
    if _DISPLAYED.fullmatch(text):
        return True
    without_commands = re.sub(r"\\[A-Za-z]+", "", text)
    return re.search(r"[A-Za-z]{2,}", without_commands) is None and re.search(r"[=<>+*/^\\-]", text) is not None
