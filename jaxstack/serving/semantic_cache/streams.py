"""Made-up streams of requests whose equivalence classes are known, from easy to hostile.

A request is a unit vector, its class, and the answer that a model would give: an earlier answer would be right if and
only if it is the same. Vectors of a class are `normalise(centre + radius * noise)`, the noise a normal vector of length
about 1, so that two requests of a class have a cosine of about 1 / (1 + radius^2), and classes are as easy to tell
apart as their centres' distance is large beside their radii.

    combo    four unlike geometries in equal parts: wide lone classes, groups hard to tell apart, pairs, a tail
    noisy    combo, where a quarter of the classes answer anew in 35 % of requests
    drift    combo, where every answer changes half-way
    tail     2,500 classes, most of them seen two or three times
    text     questions made of templates, through `HashedNgramEmbedder`; those that differ in one word differ in answer
    hostile  near-duplicates with opposite answers, one hot request whose answer keeps changing, repeated drift
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Int

from jaxstack.runtime.errors import UserError
from jaxstack.serving.semantic_cache.questions import questions

DIM = 48
_NOISY_CLASSES, _NOISY_REQUESTS = 0.25, 0.35


@dataclasses.dataclass(frozen=True)
class Stream:
    """Requests in the order in which they come.

    Attributes:
      vectors: unit rows.
      classes: equivalence classes.
      answers: the model's; equal numbers are equal answers.
      prompts: texts, where there are any.
    """

    name: str
    vectors: Float[np.ndarray, "requests dim"]
    classes: Int[np.ndarray, "requests"]
    answers: Int[np.ndarray, "requests"]
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.answers)


def make_stream(name: str, requests: int, seed: int) -> Stream:
    """One of `STREAMS`; the same arguments give the same stream.

    Raises:
      UserError: an unknown name, or fewer than eight requests.
    """
    if name not in STREAMS:
        raise UserError(f"stream: found {name!r}, expected one of {', '.join(STREAMS)}")
    if requests < 8:
        raise UserError(f"requests: found {requests}, expected at least 8")
    return STREAMS[name](requests, np.random.default_rng([seed, sorted(STREAMS).index(name)]))


# ------------------------------------------------------------------------------------------------------------ geometry


@dataclasses.dataclass(frozen=True)
class _Classes:
    """Classes of one geometry, the most frequent first."""

    centres: Float[np.ndarray, "classes dim"]
    radii: Float[np.ndarray, "classes"]
    exponent: float

    def draw(
        self, requests: int, rng: np.random.Generator
    ) -> tuple[Float[np.ndarray, "requests dim"], Int[np.ndarray, "requests"]]:
        """Vectors and classes; class i is asked in proportion to (i + 1)^-exponent."""
        shares = _zipf(len(self.radii), self.exponent)
        classes = rng.choice(len(self.radii), requests, p=shares)
        noise = rng.standard_normal((requests, self.centres.shape[1])) / np.sqrt(self.centres.shape[1])
        return _unit(self.centres[classes] + self.radii[classes, None] * noise), classes


def _zipf(count: int, exponent: float) -> Float[np.ndarray, "count"]:
    weights = np.arange(1, count + 1.0) ** -exponent
    return weights / weights.sum()


def _unit(x: Float[np.ndarray, "n dim"]) -> Float[np.ndarray, "n dim"]:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _directions(count: int, rng: np.random.Generator) -> Float[np.ndarray, "count dim"]:
    return _unit(rng.standard_normal((count, DIM)))


def _lone(rng: np.random.Generator) -> _Classes:
    """Wide, and far from each other: the safe similarity is low."""
    return _Classes(_directions(40, rng), 0.75 * rng.lognormal(0, 0.2, 40), 0.7)


def _groups(rng: np.random.Generator) -> _Classes:
    """Twelve groups of ten, whose centres are 0.22 apart: the safe similarity is high."""
    around = np.repeat(_directions(12, rng), 10, axis=0)
    centres = _unit(around + 0.22 / np.sqrt(2) * _directions(120, rng))
    return _Classes(centres[rng.permutation(120)], np.full(120, 0.13), 0.7)


def _pairs(rng: np.random.Generator) -> _Classes:
    """Forty pairs of various widths: what is safe differs from class to class."""
    firsts = _directions(40, rng)
    centres = np.concatenate([firsts, _unit(firsts + 0.6 * _directions(40, rng))])
    return _Classes(centres[rng.permutation(80)], rng.lognormal(np.log(0.3), 0.4, 80), 0.7)


def _tail(rng: np.random.Generator, classes: int = 600, exponent: float = 0.9) -> _Classes:
    return _Classes(_directions(classes, rng), np.full(classes, 0.45), exponent)


# ------------------------------------------------------------------------------------------------------------- streams


def _combo(requests: int, rng: np.random.Generator) -> Stream:
    parts = [kind(rng) for kind in (_lone, _groups, _pairs, _tail)]
    counts = [requests // 4 + (i < requests % 4) for i in range(4)]
    drawn = [part.draw(count, rng) for part, count in zip(parts, counts, strict=True)]
    offsets = np.cumsum([0, *(len(part.radii) for part in parts)])
    order = rng.permutation(requests)
    classes = np.concatenate([own + offset for (_, own), offset in zip(drawn, offsets[:-1], strict=True)])[order]
    return _stream("combo", np.concatenate([vectors for vectors, _ in drawn])[order], classes, classes)


def _noisy(requests: int, rng: np.random.Generator) -> Stream:
    plain = _combo(requests, rng)
    fickle = rng.random(plain.classes.max() + 1) < _NOISY_CLASSES
    anew = fickle[plain.classes] & (rng.random(requests) < _NOISY_REQUESTS)
    answers = np.where(anew, plain.classes.max() + 1 + np.arange(requests), plain.classes)
    return dataclasses.replace(plain, name="noisy", answers=answers)


def _drift(requests: int, rng: np.random.Generator) -> Stream:
    plain = _combo(requests, rng)
    return dataclasses.replace(plain, name="drift", answers=_drifting(plain.classes, 2))


def _drifting(classes: Int[np.ndarray, "requests"], periods: int) -> Int[np.ndarray, "requests"]:
    """Answers of which all change at once, `periods - 1` times."""
    period = np.arange(len(classes)) * periods // len(classes)
    return classes + period * (classes.max() + 1)


def _long_tail(requests: int, rng: np.random.Generator) -> Stream:
    vectors, classes = _tail(rng, 2500, 0.3).draw(requests, rng)
    return _stream("tail", vectors, classes, classes)


def _text(requests: int, rng: np.random.Generator) -> Stream:
    from jaxstack.serving.semantic_cache.embedders import HashedNgramEmbedder

    prompts, classes = questions(requests, rng)
    vectors = HashedNgramEmbedder().embed(prompts)
    return dataclasses.replace(_stream("text", vectors, classes, classes), prompts=tuple(prompts))


def _hostile(requests: int, rng: np.random.Generator) -> Stream:
    """A third twins that no similarity tells apart, a tenth one hot request, the rest combo with answers that change
    three times. Every fiftieth hot request has a new answer.
    """
    twins, hot = requests // 3, requests // 10
    centres = np.repeat(_directions(60, rng), 2, axis=0)
    twin_vectors, twin_classes = _Classes(centres, np.full(120, 0.15), 0.7).draw(twins, rng)
    hot_vectors, _ = _Classes(_directions(1, rng), np.full(1, 0.02), 0.0).draw(hot, rng)
    rest = _combo(requests - twins - hot, rng)
    drifting = _drifting(rest.classes, 4)
    first = drifting.max() + 1
    vectors = np.concatenate([rest.vectors, twin_vectors, hot_vectors])
    answers = np.concatenate([drifting, first + twin_classes, first + 120 + np.arange(hot) // 50])
    classes = np.concatenate([rest.classes, first + twin_classes, np.full(hot, first + 120)])
    # Mixed, each part in its own order: what changes with time goes on doing so.
    part = rng.permutation(np.repeat([0, 1, 2], [len(rest), twins, hot]))
    order = np.argsort(part, kind="stable").argsort()
    return _stream("hostile", vectors[order], classes[order], answers[order])


def _stream(
    name: str,
    vectors: Float[np.ndarray, "requests dim"],
    classes: Int[np.ndarray, "requests"],
    answers: Int[np.ndarray, "requests"],
) -> Stream:
    return Stream(name, vectors.astype(np.float32), classes.astype(np.int64), answers.astype(np.int64))


STREAMS: Mapping[str, Callable[[int, np.random.Generator], Stream]] = {
    "combo": _combo,
    "noisy": _noisy,
    "drift": _drift,
    "tail": _long_tail,
    "text": _text,
    "hostile": _hostile,
}
