"""Programs whose requests depend on each other: trees of thoughts, a judge, conversations.

A client runs a number of programs at a time and begins another when one is over. What a program asks next follows from
what it was answered, so a client that is starved asks less: what independent requests cannot show. Shapes and lengths
are those of the workloads in arXiv 2501.14312 (trees of thoughts on GSM8K, an LLM as a judge of articles, Chatbot
Arena). Plain Python, no jax.
"""

import dataclasses
import random
from collections.abc import Generator, Sequence

from jaxstack.engine.scheduling.driving import Arrival, Outcome, TokenIds
from jaxstack.runtime.errors import UserError

Range = tuple[int, int]
# A program: yields the prompts and lengths that it asks for together, is sent their answers in the same order.
Asked = tuple[TokenIds, int]
Program = Generator[list[Asked], list[TokenIds], None]


class Author:
    """Draws the tokens of one client's programs."""

    def __init__(self, seed: str, vocab: int):
        self.random, self._vocab = random.Random(seed), vocab

    def text(self, tokens: int) -> TokenIds:
        return tuple(self.random.choices(range(3, self._vocab), k=tokens))

    def length(self, range_: Range) -> int:
        return self.random.randint(*range_)


@dataclasses.dataclass(frozen=True)
class TreeShape:
    """A tree of thoughts: from the question, `height` levels, each thought continued by `branching` others. A level is
    asked when the one before has been answered, so a tree makes branching + ... + branching^height requests.
    """

    branching: int = 2
    height: int = 4
    question_tokens: int = 128
    output: Range = (48, 80)

    def program(self, author: Author) -> Program:
        level = [author.text(self.question_tokens)]
        for _ in range(self.height):
            asked = [(path, author.length(self.output)) for path in level for _ in range(self.branching)]
            answers = yield asked
            level = [prompt + answer for (prompt, _), answer in zip(asked, answers, strict=True)]


@dataclasses.dataclass(frozen=True)
class JudgeShape:
    """A judge of articles: proposes what to look at, judges each of `dimensions`, then puts the verdicts together.

    `extra_tokens` stand before each article.
    """

    dimensions: int = 2
    article_tokens: int = 2400
    extra_tokens: int = 0
    instruction_tokens: int = 40
    output: Range = (192, 320)

    def program(self, author: Author) -> Program:
        article = author.text(self.extra_tokens + self.article_tokens)
        ask = lambda: author.text(self.instruction_tokens)  # noqa: E731
        (plan,) = yield [(article + ask(), author.length(self.output))]
        verdicts = yield [(article + ask() + plan, author.length(self.output)) for _ in range(self.dimensions)]
        everything = tuple(token for verdict in verdicts for token in verdict)
        yield [(article + ask() + everything, author.length(self.output))]


@dataclasses.dataclass(frozen=True)
class ChatShape:
    """A conversation: each turn repeats all that was said, and adds a message."""

    turns: Range = (2, 6)
    message: Range = (16, 96)
    output: Range = (64, 220)

    def program(self, author: Author) -> Program:
        said: TokenIds = ()
        for _ in range(author.length(self.turns)):
            said += author.text(author.length(self.message))
            (answer,) = yield [(said, author.length(self.output))]
            said += answer


Shape = TreeShape | JudgeShape | ChatShape


@dataclasses.dataclass(frozen=True)
class ProgramClient:
    """A client that keeps `programs` of one shape running."""

    name: str
    shape: Shape
    programs: int = 1
    well_behaved: bool = True

    def __post_init__(self) -> None:
        if self.programs < 1:
            raise UserError(f"programs of client {self.name!r}: found {self.programs}, expected an integer >= 1")


@dataclasses.dataclass(frozen=True)
class ProgramRun:
    """A program that is over."""

    client: str
    began_s: float
    ended_s: float
    requests: int


@dataclasses.dataclass
class _Running:
    client: ProgramClient
    program: Program
    began_s: float
    requests: int = 0
    asked: int = 0
    answers: dict[int, TokenIds] = dataclasses.field(default_factory=dict)


class Programs:
    """The closed loop of such clients.

    Args:
      clients: who takes part.
      vocab: token ids are drawn from [3, vocab).
      seed: of everything; each client draws from a generator of its own.

    Attributes:
      finished: the programs that are over, in order.
    """

    def __init__(self, clients: Sequence[ProgramClient], *, vocab: int = 1 << 16, seed: int = 0):
        self.clients = tuple(clients)
        self._authors = {c.name: Author(f"{seed} {c.name}", vocab) for c in clients}
        self._seed = seed
        self.finished: list[ProgramRun] = []

    @property
    def well_behaved(self) -> frozenset[str]:
        return frozenset(c.name for c in self.clients if c.well_behaved)

    def start(self) -> list[Arrival]:
        begun = [c for c in self.clients for _ in range(c.programs)]
        random.Random(f"{self._seed} order").shuffle(begun)
        return [arrival for c in begun for arrival in self._begin(c, 0.0)]

    def on_done(self, outcome: Outcome) -> list[Arrival]:
        running, place = outcome.arrival.tag
        running.answers[place] = outcome.answer
        if len(running.answers) < running.asked:
            return []
        answers = [running.answers[i] for i in range(running.asked)]
        try:
            return self._ask(running, running.program.send(answers))
        except StopIteration:
            client = running.client
            self.finished.append(ProgramRun(client.name, running.began_s, outcome.finished_s, running.requests))
            return self._begin(client, outcome.finished_s)

    def _begin(self, client: ProgramClient, now_s: float) -> list[Arrival]:
        program = client.shape.program(self._authors[client.name])
        return self._ask(_Running(client, program, now_s), next(program))

    def _ask(self, running: _Running, asked: list[Asked]) -> list[Arrival]:
        running.asked, running.answers = len(asked), {}
        running.requests += len(asked)
        return [
            Arrival(running.client.name, prompt, output, tag=(running, place))
            for place, (prompt, output) in enumerate(asked)
        ]


def _clients(well_behaved: int, shape: Shape, others: int, other: Shape, programs: int) -> list[ProgramClient]:
    return [ProgramClient(f"client-{i:02}", shape, programs) for i in range(well_behaved)] + [
        ProgramClient(f"flood-{i:02}", other, programs, well_behaved=False) for i in range(others)
    ]


def trees(
    seed: int = 0,
    *,
    vocab: int = 1 << 16,
    well_behaved: int = 12,
    branching: int = 4,
    question_tokens: int = 128,
    misbehaving: int = 4,
    programs: int = 1,
) -> Programs:
    """Trees of 30 requests, beside misbehaving clients: by default S1, trees of 340 requests. S2, longer questions, is
    `branching=2, question_tokens=1280`.
    """
    other = TreeShape(branching, question_tokens=question_tokens)
    return Programs(_clients(well_behaved, TreeShape(), misbehaving, other, programs), vocab=vocab, seed=seed)


def judge(
    seed: int = 0,
    *,
    vocab: int = 1 << 16,
    well_behaved: int = 12,
    dimensions: int = 16,
    extra_tokens: int = 0,
    misbehaving: int = 4,
    programs: int = 1,
    article_tokens: int = 2400,
) -> Programs:
    """Judges of 2 dimensions, beside misbehaving ones: by default S1, 16 dimensions. S2, more before each article, is
    `dimensions=2, extra_tokens=600`.
    """
    shape = JudgeShape(article_tokens=article_tokens)
    other = JudgeShape(dimensions, article_tokens, extra_tokens)
    return Programs(_clients(well_behaved, shape, misbehaving, other, programs), vocab=vocab, seed=seed)


def chat(seed: int = 0, *, vocab: int = 1 << 16, clients: int = 16, programs: int = 4) -> Programs:
    """Conversations."""
    return Programs(_clients(clients, ChatShape(), 0, ChatShape(), programs), vocab=vocab, seed=seed)
