"""Arrivals that wait for nobody: Gamma processes, questions on long documents, and the traces of the fairness work.

Lengths of the long documents are those of LooGLE in arXiv 2501.14312; the traces follow the synthetic ones of the
virtual token counter's paper, arXiv 2401.00588. Everything is generated; no data set is needed. Plain Python, no jax.
"""

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping

from jaxstack.engine.scheduling.driving import Arrival, OpenLoop, TokenIds
from jaxstack.runtime.errors import UserError


def gamma_arrivals(rate: float, until_s: float, draw: random.Random, *, cv: float = 1.0) -> Iterator[float]:
    """Times of a Gamma process: `rate` a second on average, gaps with the coefficient of variation `cv` (1: Poisson).

    Raises:
      UserError: a rate or a coefficient that is not positive.
    """
    if rate <= 0 or cv <= 0:
        raise UserError(f"arrivals: found rate {rate} and coefficient of variation {cv}, expected numbers > 0")
    shape = 1 / cv**2
    now = draw.gammavariate(shape, 1 / (rate * shape))
    while now < until_s:
        yield now
        now += draw.gammavariate(shape, 1 / (rate * shape))


def _text(draw: random.Random, tokens: int, vocab: int) -> TokenIds:
    return tuple(draw.choices(range(3, vocab), k=tokens))


def _lognormal(draw: random.Random, mean: float, sigma: float, low: int, high: int) -> int:
    return min(high, max(low, round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))))


@dataclasses.dataclass(frozen=True)
class Questioner:
    """A client that asks about long documents: `questions` on each before the next, `rate` a second on average."""

    name: str
    rate: float
    document_tokens: int = 21_449
    questions: int = 6
    question_tokens: int = 32
    output_tokens: int = 15
    cv: float = 2.0


class LongDocuments(OpenLoop):
    """Questions on documents of about the given length, arriving by Gamma processes.

    Args:
      clients: who asks; those whose name begins with "client" are well-behaved.
    """

    def __init__(self, clients: list[Questioner], until_s: float, *, vocab: int = 1 << 16, seed: int = 0):
        self.well_behaved = frozenset(c.name for c in clients if c.name.startswith("client"))
        super().__init__(arrival for c in clients for arrival in _questions(c, until_s, vocab, seed))


def _questions(client: Questioner, until_s: float, vocab: int, seed: int) -> Iterator[Arrival]:
    draw = random.Random(f"{seed} {client.name}")
    document: TokenIds = ()
    for i, at_s in enumerate(gamma_arrivals(client.rate, until_s, draw, cv=client.cv)):
        if i % client.questions == 0:
            mean = client.document_tokens
            document = _text(draw, _lognormal(draw, mean, 0.25, mean // 2, 3 * mean // 2), vocab)
        question = _text(draw, client.question_tokens, vocab)
        yield Arrival(client.name, document + question, client.output_tokens, at_s=at_s)


def long_documents(
    seed: int = 0,
    *,
    until_s: float,
    clients: int = 8,
    rate: float = 0.5,
    floods: float = 4.0,
    longer: float = 1.0,
    misbehaving: int = 2,
    document_tokens: int = 21_449,
    vocab: int = 1 << 16,
) -> LongDocuments:
    """Well-behaved clients of one rate, beside misbehaving ones: `floods` times the rate (S1), documents `longer` times
    as long (S2).
    """
    everyone = [Questioner(f"client-{i:02}", rate, document_tokens) for i in range(clients)]
    everyone += [
        Questioner(f"flood-{i:02}", rate * floods, round(document_tokens * longer)) for i in range(misbehaving)
    ]
    return LongDocuments(everyone, until_s, vocab=vocab, seed=seed)


@dataclasses.dataclass(frozen=True)
class Stream:
    """A client of a trace: `per_minute` requests of given lengths, evenly or at random, between two times.

    `on_s`, `off_s`: sends for so long, is silent for so long, and so on; `off_s` 0 is never silent.
    """

    client: str
    per_minute: float
    prompt_tokens: int = 256
    output_tokens: int = 256
    poisson: bool = False
    begin_s: float = 0.0
    end_s: float = float("inf")
    on_s: float = 60.0
    off_s: float = 0.0

    def arrivals(self, until_s: float, draw: random.Random, vocab: int) -> Iterator[Arrival]:
        end_s, gap = min(until_s, self.end_s), 60 / self.per_minute
        if self.poisson:
            times = gamma_arrivals(1 / gap, end_s - self.begin_s, draw)
        else:
            times = (i * gap for i in range(math.ceil((end_s - self.begin_s) / gap)))
        for since in times:
            if not self.off_s or since % (self.on_s + self.off_s) < self.on_s:
                prompt = _text(draw, self.prompt_tokens, vocab)
                yield Arrival(self.client, prompt, self.output_tokens, at_s=self.begin_s + since)


def _arena(draw: random.Random) -> list[Stream]:
    """27 clients, a few of which send most: rates fall as 1 / rank; lengths vary from client to client."""
    return [
        Stream(
            f"client-{i:02}",
            210 / (i + 1),
            _lognormal(draw, 136, 0.8, 2, 1021),
            _lognormal(draw, 256, 0.6, 2, 977),
            poisson=True,
        )
        for i in range(27)
    ]


TRACES: Mapping[str, Callable[[random.Random, float], list[Stream]]] = {
    # Both send more than their share, one twice as much.
    "overload": lambda draw, until_s: [Stream("client-1", 90), Stream("client-2", 180)],
    # One within its share and silent half of the time, one beyond it.
    "on_off": lambda draw, until_s: [Stream("client-1", 30, off_s=60), Stream("client-2", 120)],
    "on_off_overload": lambda draw, until_s: [Stream("client-1", 120, off_s=60), Stream("client-2", 180)],
    # At random; short requests at a high rate, long ones at a low one.
    "poisson": lambda draw, until_s: [
        Stream("client-1", 480, 64, 64, poisson=True),
        Stream("client-2", 90, 256, 256, poisson=True),
    ],
    # Prompts long and answers short, against the reverse.
    "long_prompts": lambda draw, until_s: [
        Stream("client-1", 90, 64, 512, poisson=True),
        Stream("client-2", 90, 512, 64, poisson=True),
    ],
    # One client sends ever more and stays within its share at first.
    "shift": lambda draw, until_s: [
        Stream("client-1", 60),
        Stream("client-2", 30, end_s=until_s / 3),
        Stream("client-2", 90, begin_s=until_s / 3, end_s=2 * until_s / 3),
        Stream("client-2", 180, begin_s=2 * until_s / 3),
    ],
    "arena": lambda draw, until_s: _arena(draw),
}
"""The synthetic traces: name -> the streams of its clients, rates a minute as for a replica of about 800 tokens/s."""


def trace(name: str, seed: int = 0, *, until_s: float = 600.0, speed: float = 1.0, vocab: int = 1 << 16) -> OpenLoop:
    """The synthetic trace of that name.

    Args:
      speed: all rates are multiplied by this; the times at which they change are not.

    Raises:
      UserError: there is none, or a speed that is not positive.
    """
    if name not in TRACES:
        raise UserError(f"trace: found {name!r}, expected one of {', '.join(sorted(TRACES))}")
    if speed <= 0:
        raise UserError(f"speed: found {speed}, expected a number > 0")
    draw = random.Random(f"{seed} {name}")
    streams = [dataclasses.replace(s, per_minute=s.per_minute * speed) for s in TRACES[name](draw, until_s)]
    return OpenLoop(arrival for s in streams for arrival in s.arrivals(until_s, draw, vocab))
