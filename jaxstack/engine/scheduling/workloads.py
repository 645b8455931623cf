"""Closed loops over documents: each client keeps so many requests waiting, every one a question on a long prefix.

`named` builds what the benchmarks run: `mixed` (well-behaved clients beside flooding ones), `equal` and `long`; the
programs of `programs.py` (`trees`, `judge`, `chat`) stand beside them. Plain Python, no jax.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence

from jaxstack.engine.scheduling.driving import Arrival, Outcome, TokenIds, Workload
from jaxstack.engine.scheduling.programs import chat, judge, trees
from jaxstack.runtime.errors import UserError

Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class DocumentClient:
    """A client that asks about documents.

    Args:
      name: the client's.
      document_tokens: length of each.
      open_documents: how many it asks about at a time, at random.
      questions: on a document before another takes its place; None keeps the first ones for ever.
      backlog: requests that it has open at all times.
      well_behaved: whether it counts when latencies are reported.
    """

    name: str
    document_tokens: int = 512
    open_documents: int = 2
    questions: int | None = 8
    backlog: int = 8
    well_behaved: bool = True

    def __post_init__(self) -> None:
        for name in ("document_tokens", "open_documents", "questions", "backlog"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} of client {self.name!r}: found {value}, expected an integer >= 1")


class Documents:
    """The closed loop of such clients.

    Args:
      clients: who takes part.
      question: fewest and most tokens of a question.
      output: fewest and most tokens of an answer, equally likely all.
      vocab: token ids are drawn from [3, vocab).
      seed: of everything; each client draws from a generator of its own, so what one asks depends on nobody else.
    """

    def __init__(
        self,
        clients: Sequence[DocumentClient],
        *,
        question: Range = (16, 48),
        output: Range = (8, 24),
        vocab: int = 1 << 16,
        seed: int = 0,
    ):
        self.clients = tuple(clients)
        self._question, self._output, self._vocab, self._seed = question, output, vocab, seed
        self._random = {c.name: random.Random(f"{seed} {c.name}") for c in clients}
        self._specs = {c.name: c for c in clients}
        self._open: dict[str, list[tuple[TokenIds, int]]] = {}
        for c in clients:
            self._open[c.name] = [self._document(c) for _ in range(c.open_documents)]

    @property
    def well_behaved(self) -> frozenset[str]:
        return frozenset(c.name for c in self.clients if c.well_behaved)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its answer among them."""
        return max(c.document_tokens for c in self.clients) + self._question[1] + self._output[1]

    def start(self) -> list[Arrival]:
        arrivals = [self._ask(c) for c in self.clients for _ in range(c.backlog)]
        random.Random(f"{self._seed} order").shuffle(arrivals)
        return arrivals

    def on_done(self, outcome: Outcome) -> list[Arrival]:
        return [self._ask(self._specs[outcome.client])]

    def _document(self, client: DocumentClient) -> tuple[TokenIds, int]:
        return self._tokens(client, client.document_tokens), 0

    def _ask(self, client: DocumentClient) -> Arrival:
        draw, documents = self._random[client.name], self._open[client.name]
        which = draw.randrange(len(documents))
        document, asked = documents[which]
        documents[which] = (document, asked + 1)
        if client.questions is not None and asked + 1 >= client.questions:
            documents[which] = self._document(client)
        question = self._tokens(client, draw.randint(*self._question))
        return Arrival(client.name, document + question, draw.randint(*self._output))

    def _tokens(self, client: DocumentClient, count: int) -> TokenIds:
        draw = self._random[client.name]
        return tuple(draw.choices(range(3, self._vocab), k=count))


def mixed(
    seed: int = 0,
    *,
    vocab: int = 1 << 16,
    well_behaved: int = 12,
    flooding: int = 4,
    backlog: int = 8,
    flood: int = 48,
    document_tokens: int = 512,
    prefix_tokens: int = 256,
    output: Range = (8, 24),
) -> Documents:
    """Clients with two open documents each, beside clients that flood: many requests on one fixed short prefix."""
    clients = [
        DocumentClient(f"client-{i:02}", document_tokens, backlog=backlog) for i in range(well_behaved)
    ] + [
        DocumentClient(f"flood-{i:02}", prefix_tokens, 1, None, flood, well_behaved=False) for i in range(flooding)
    ]  # fmt: skip
    return Documents(clients, output=output, vocab=vocab, seed=seed)


def equal(
    seed: int = 0, *, vocab: int = 1 << 16, clients: int = 16, open_documents: int = 2, backlog: int = 8
) -> Documents:
    """Nobody floods."""
    everyone = [
        DocumentClient(f"client-{i:02}", open_documents=open_documents, backlog=backlog) for i in range(clients)
    ]
    return Documents(everyone, vocab=vocab, seed=seed)


def long(seed: int = 0, *, vocab: int = 1 << 16) -> Documents:
    """`mixed` with documents and prefixes of 1,024 tokens, and short answers."""
    return mixed(seed, vocab=vocab, document_tokens=1024, prefix_tokens=1024, output=(4, 12))


NAMED: Mapping[str, Callable[..., Workload]] = {
    "mixed": mixed,
    "equal": equal,
    "long": long,
    "trees": trees,
    "judge": judge,
    "chat": chat,
}


def named(name: str, seed: int = 0, **options: int) -> Workload:
    """The workload of that name.

    Raises:
      UserError: there is none.
    """
    if name not in NAMED:
        raise UserError(f"workload: found {name!r}, expected one of {', '.join(sorted(NAMED))}")
    return NAMED[name](seed, **options)


def well_behaved(workload: Workload) -> frozenset[str]:
    """The clients whose latencies are reported; none where the workload does not say."""
    return getattr(workload, "well_behaved", frozenset())
