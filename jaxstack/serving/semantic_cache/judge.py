"""Whether two answers to a question are the same: the labels of the cache."""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from jaxstack.runtime.errors import UserError


class Judge(Protocol):
    """Compares the answer that the model gave with the one that the cache would have given."""

    def same(self, query: str, a: str, b: str) -> bool | None:
        """None: cannot tell. That is never a no."""
        ...


class NormalisedText:
    """Equal but for case, punctuation, spaces, and how numbers are written (1,000.0 is 1000). Of what nothing is left
    is compared as it is.
    """

    def same(self, query: str, a: str, b: str) -> bool | None:
        x, y = _plain(a), _plain(b)
        return x == y if x or y else a.strip() == b.strip()


class ExactJson:
    """Equal as JSON; None if one of them is none."""

    def same(self, query: str, a: str, b: str) -> bool | None:
        try:
            return bool(json.loads(a) == json.loads(b))
        except (ValueError, RecursionError):
            return None


class EmbeddingJudge:
    """Cosine of the answers at least `threshold`."""

    def __init__(self, embed: Callable[[Sequence[str]], Float[np.ndarray, "n dim"]], threshold: float):
        self._embed, self._threshold = embed, threshold

    def same(self, query: str, a: str, b: str) -> bool | None:
        x, y = np.asarray(self._embed([a, b]), dtype=np.float64)
        cosine = float(x @ y)
        return cosine >= self._threshold if np.isfinite(cosine) else None


class LMJudge:
    """Asks a language model, which can say nothing but yes or no.

    Args:
      model: a `jaxstack.serving.LanguageModel`.
    """

    _QUESTION = (
        "Two answers to the same question. Do they say the same, so that either could stand for the other?\n\n"
        "Question:\n{query}\n\nFirst answer:\n{a}\n\nSecond answer:\n{b}\n\nReply with yes or no."
    )

    def __init__(self, model: Any):
        self._model = model

    def same(self, query: str, a: str, b: str) -> bool | None:
        from jaxstack.engine import Guide, SamplingParams

        if NormalisedText().same(query, a, b):
            return True
        sampling = SamplingParams(max_tokens=8, temperature=0.0, guide=Guide("choice", '["yes", "no"]'))
        question = self._QUESTION.format(query=query, a=a, b=b)
        result = self._model.generate([[{"role": "user", "content": question}]], sampling)[0]
        return {"yes": True, "no": False}.get(result.text.strip())


class CascadeJudge:
    """The first judge if it says yes, else the second: equal texts need no model."""

    def __init__(self, first: Judge, second: Judge):
        self._first, self._second = first, second

    def same(self, query: str, a: str, b: str) -> bool | None:
        return True if self._first.same(query, a, b) else self._second.same(query, a, b)


class Agreement(NamedTuple):
    """How often a model's answers to the very same prompt are the same; no cache can be right more often.

    Attributes:
      share: of pairs that the judge could tell.
      pairs: of these, how many.
    """

    share: float
    pairs: int

    def check(self, delta: float) -> None:
        """Raises UserError if the model itself disagrees with itself more often than delta allows."""
        if delta < 1 - self.share:
            raise UserError(
                f"delta: found {delta}, expected at least {1 - self.share:.4f}: that often two answers of the model "
                "to the same prompt differ",
                exit_code=2,
            )


def calibrate(judge: Judge, generate: Callable[[str], str], prompts: Sequence[str], repeats: int = 2) -> Agreement:
    """Asks each prompt `repeats` times and compares the answers with the first."""
    verdicts = []
    for prompt in prompts:
        answers = [generate(prompt) for _ in range(repeats)]
        verdicts += [judge.same(prompt, answers[0], other) for other in answers[1:]]
    told = [verdict for verdict in verdicts if verdict is not None]
    if not told:
        raise UserError("prompts: the judge could tell of no pair of answers whether they are the same")
    return Agreement(sum(told) / len(told), len(told))


# Points and dashes within numbers and words; signs that change what is said (and are not Markdown's); all the rest.
_MARKS = re.compile(
    r"(?P<within>(?<=\d)\.(?=\d)|(?<=\w)-|-(?=\d))|(?P<sign>(?<=\w)[*/](?=\w)|(?<=\w )[*/](?= \w)|(?<=\w)#|!(?==)|%)"
    r"|[^\w\s]|_"
)


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub(r"(?<![\d.])(\d+)\.0+(?!\.?\d)", r"\1", text)  # 3.0, but not the version 3.0.1
    return " ".join(_MARKS.sub(_mark, text).split())


def _mark(found: re.Match[str]) -> str:
    mark = found.group()
    if found["within"]:
        return mark
    # Symbols: those of mathematics and currencies, pictures.
    kept = found["sign"] or (unicodedata.category(mark)[0] == "S" and mark != "`")
    return f" {mark} " if kept else " "
