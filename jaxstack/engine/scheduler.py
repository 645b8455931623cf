"""What the next step computes: which sequences, which of their tokens, on which pages. Plain Python, no jax.

One step: decode rows first (so that a long prompt never delays a running answer by more than one step), then prompts
that are partly computed, then new ones as the policy orders them, each as far as the token budget, the slots and the
pages go. When a running sequence needs a page and none is left, cached prefixes are evicted, then the policy's victim
is preempted: its whole pages go to the prefix cache, so that coming back is mostly a cache hit.

A step is planned while the one before it still runs. So a plan counts on tokens that nobody has read yet
(`Sequence.pending`), and three calls frame a step: `plan`, `launched` when the device has been given it, `settled` when
its results are on the host. No page goes back to the pool while a launched step may still write it: a sequence that
ends keeps its pages until its last row has settled, and nobody is preempted before the step in flight has.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Hashable

from jaxstack.engine.memory import PagePool, RadixTree
from jaxstack.engine.request import Sequence
from jaxstack.engine.scheduling import Policy
from jaxstack.engine.speculate import Drafter


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens `[start, start + count)` of a sequence. `samples`: they reach its end, so a new token is drawn. `scores`:
    the logprobs of the prompt tokens behind each of them are wanted. `draft`: the one token, guessed; the row counts
    only if it turns out to be the right one.
    """

    sequence: Sequence
    start: int
    count: int
    samples: bool
    scores: bool = False
    draft: int | None = None

    @property
    def decode(self) -> bool:
        """Whether a decode step will do: one token in, one token out."""
        return self.count == 1 and self.samples and not self.sequence.request.needs_hidden(self.start)


@dataclasses.dataclass
class StepPlan:
    """Rows of one step, those that a decode step would do for first. `decodes` counts these. Fixed once made."""

    rows: list[Row]
    decodes: int

    @functools.cached_property
    def tokens(self) -> int:
        return sum(row.count for row in self.rows)

    @functools.cached_property
    def drafted(self) -> bool:
        """Whether it guesses, so that nobody knows how far its sequences get before it has settled."""
        return any(row.draft is not None for row in self.rows)


Rows = dict[Sequence, list[Row]]


class _Unsettled(Exception):
    """Pages are short, and the step in flight must settle before anything can be taken from anyone."""


@dataclasses.dataclass
class SchedulerCounters:
    """Running totals since the start. Prefix figures are in tokens."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    drafted_tokens: int = 0
    accepted_drafts: int = 0


class Scheduler:
    """Owns the waiting and running sequences, the page pool and the prefix cache.

    Args:
      policy: orders the waiting sequences and picks victims.
      num_pages, page_size: the KV cache. A sequence must fit alone: the engine refuses others when they arrive.
      max_sequences: sequences running at once (rows of a step).
      max_batch_tokens: tokens of one step, at least `max_sequences`.
      prefix_caching: keep finished prefixes for reuse.
      max_rows: sampled rows of a step, drafts included; `max_sequences` by default.
      speculation: draft tokens a sequence may have in a step (`speculate.py`).
      speculation_rows: nobody drafts where that would give a step more rows than this.
      clock: seconds, monotonic; a simulator passes its own.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        num_pages: int,
        page_size: int,
        max_sequences: int,
        max_batch_tokens: int,
        prefix_caching: bool = True,
        max_rows: int = 0,
        speculation: int = 0,
        speculation_rows: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.policy = policy
        self.page_size = page_size
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.prefix_caching = prefix_caching
        self.speculation = speculation
        self.speculation_rows = min(speculation_rows, max(max_rows, max_sequences))
        self.pool = PagePool(num_pages)
        self.tree = RadixTree(self.pool)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.closing: list[Sequence] = []  # finished, but a launched step still writes their pages
        self.counters = SchedulerCounters()
        self._clock = clock
        self._slots = list(range(max_sequences - 1, -1, -1))
        self._steps_launched = self._steps_settled = 0
        # Pages to free once the step of that number has settled.
        self._retired: collections.deque[tuple[int, list[int]]] = collections.deque()

    # What a policy may look at (`SchedulerView`).

    @property
    def now_s(self) -> float:
        return self._clock()

    @property
    def free_pages(self) -> int:
        return self.pool.free + self.tree.evictable

    def cached_tokens(self, request: Sequence) -> int:
        """Tokens of `request` that the prefix cache holds now."""
        keys = self._keys(request, self._sharable(request))
        return self.tree.peek(keys, self._namespace(request)) * self.page_size

    @property
    def in_flight(self) -> bool:
        """Whether a launched step has not settled."""
        return self._steps_launched > self._steps_settled

    @property
    def drafting(self) -> bool:
        """Whether the next step may guess: then the one in flight has to settle before it is planned."""
        few = self.speculation and 2 * len(self.running) <= self.speculation_rows and not self.waiting
        return bool(few) and any(sequence.drafter for sequence in self.running)

    # The way of a sequence: add, then plan, launched and settled (again and again), finish.

    def add(self, sequence: Sequence) -> None:
        sampling = sequence.request.sampling
        # Grammars and penalties depend on the tokens before, which a guess does not have for certain.
        if self.speculation and sampling.guide is None and not sampling.penalised:
            sequence.drafter = Drafter(self.speculation)
        self.waiting.append(sequence)

    def plan(self) -> StepPlan | None:
        """The next step's rows, with pages allocated for every one of them. Empty when there is nothing to do.

        None: pages are short and a step is in flight. Settle it (it may free some), then plan again.
        """
        rows: Rows = {}
        try:
            self._fill(rows)
        except _Unsettled:
            return None
        chosen = [row for each in rows.values() for row in each]
        decodes = [r for r in chosen if r.decode]
        chunks = [r for r in chosen if not r.decode]
        return StepPlan(decodes + chunks, len(decodes))

    def launched(self, plan: StepPlan) -> None:
        """The device has been given the step. Steps run one after the other, so what this one writes is there for the
        next: new prompt pages become shareable at once.
        """
        self._steps_launched += 1
        for row in plan.rows:
            sequence = row.sequence
            sequence.computed = row.start + row.count
            sequence.in_flight += 1
            sequence.pending += row.samples
            if row.count > 1 or not row.samples:
                self._share(sequence)

    def settled(self, plan: StepPlan) -> None:
        """The oldest step in flight is over. Its drawn tokens are the caller's to append to `Sequence.tokens`, except
        those of sequences that have finished meanwhile.
        """
        self._steps_settled += 1
        for row in plan.rows:
            sequence = row.sequence
            sequence.in_flight -= 1
            sequence.pending -= row.samples
            if sequence.finish_reason is not None:
                if not sequence.in_flight and sequence in self.closing:
                    self.closing.remove(sequence)
                    self._release(sequence, keep=sequence.finish_reason != "error")
            elif row.draft is None:  # what drafts add is known when they have been compared: see `accept`
                if plan.drafted:
                    sequence.computed = row.start + row.count
                fresh = max(0, min(row.start + row.count, len(sequence.request.prompt)) - row.start)
                self.policy.on_tokens(sequence, fresh, int(row.samples))
        while self._retired and self._retired[0][0] <= self._steps_settled:
            self.pool.release(self._retired.popleft()[1])

    def accept(self, row: Row) -> bool:
        """Whether a settled draft row counts, all rows before it having been taken: its guess was right."""
        sequence = row.sequence
        self.counters.drafted_tokens += 1
        if row.start >= len(sequence.tokens) or sequence.tokens[row.start] != row.draft:
            return False
        self.counters.accepted_drafts += 1
        sequence.computed = row.start + 1
        self.policy.on_tokens(sequence, 0, 1)
        return True

    def keep_scores(self, sequence: Sequence) -> None:
        """Leaves the scores of a prompt that is computed with its pages in the prefix cache."""
        if sequence.node is not None:
            self.tree.annotate(sequence.node, sequence.request.scores.pages(self.page_size))

    def finish(self, sequence: Sequence) -> None:
        """Takes `sequence`, whose `finish_reason` is set, out. Its pages are freed when no launched step writes them
        any more, the whole ones into the prefix cache unless it ended in an error.
        """
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            if sequence.in_flight:
                self.closing.append(sequence)
            else:
                self._release(sequence, keep=sequence.finish_reason != "error")
        self.policy.on_finish(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """`sequence` gives up its pages and waits again; it will recompute what the prefix cache has lost by then."""
        assert not self.in_flight
        self._release(sequence, keep=True)
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.counters.preemptions += 1

    def check_accounting(self) -> None:
        """Raises AssertionError unless every page is free, the tree's, or private to exactly one sequence."""
        alive = self.running + self.closing
        private = [page for s in alive for page in s.pages[s.shared_pages :]]
        private += [page for _, pages in self._retired for page in pages]
        shared = [page for node in self.tree.nodes() for page in node.pages]
        assert len(private) == len(set(private)) == self.pool.private, "private pages"
        assert len(shared) == len(set(shared)) == self.pool.tree, "tree pages"
        assert not set(private) & set(shared), "a page with two owners"
        assert self.pool.free + len(private) + len(shared) == self.pool.size, "pages lost"
        locked = sum(len(node.pages) for node in self.tree.nodes() if node.lock)
        assert self.tree.evictable == len(shared) - locked, "evictable count"
        assert all(s.pages[: s.shared_pages] == self._path(s.node) for s in alive if s.node), "shared prefix"

    # Inside.

    def _fill(self, rows: Rows) -> None:
        ready = [s for s in self.running if not s.complete]
        decoding = [s for s in ready if s.remaining == 1]
        prefilling = [s for s in ready if s.remaining > 1]
        budget, drafting = self.max_batch_tokens, self.drafting
        for sequence in decoding:
            if sequence.slot >= 0 and self._reserve(sequence, sequence.length, rows):
                rows[sequence] = [Row(sequence, sequence.computed, 1, True)]
                if drafting and not self.waiting:  # reserving may have preempted somebody
                    rows[sequence] += self._drafts(sequence)
                budget -= len(rows[sequence])
        for sequence in prefilling:
            budget -= self._chunk(sequence, budget, rows)
        if self.waiting and budget > 0 and self._slots:
            self._admit(budget, rows)

    def _drafts(self, sequence: Sequence) -> list[Row]:
        """Rows of guesses behind the one row that is certain. They take free pages but nobody else's."""
        if sequence.drafter is None or sequence.pending:
            return []
        known = len(sequence.tokens)
        share = self.speculation_rows // len(self.running) - 1
        free = (len(sequence.pages) + self.pool.free) * self.page_size - known
        useful = sequence.request.max_tokens - sequence.generated - 1
        draft = sequence.drafter.propose(sequence.tokens, min(share, free, useful))
        need = self._pages_for(known + len(draft)) - len(sequence.pages)
        if need > 0:
            sequence.pages.extend(self.pool.allocate(need))
        return [Row(sequence, known + i, 1, True, draft=token) for i, token in enumerate(draft)]

    def _chunk(self, sequence: Sequence, budget: int, rows: Rows) -> int:
        """Plans as much of a prompt as `budget` allows; returns the tokens planned."""
        count = min(sequence.remaining, budget)
        if count <= 0 or sequence.slot < 0 or not self._reserve(sequence, sequence.computed + count, rows):
            return 0
        scores = sequence.scoring and sequence.computed + 1 < len(sequence.request.prompt)
        rows[sequence] = [Row(sequence, sequence.computed, count, count == sequence.remaining, scores)]
        return count

    def _admit(self, budget: int, rows: Rows) -> None:
        ordered = sorted(self.policy.order(self.waiting, self), key=lambda s: s.priority)
        for sequence in ordered:
            if budget <= 0 or not self._slots:
                return
            assert isinstance(sequence, Sequence)
            namespace = self._namespace(sequence)
            keys = self._keys(sequence, self._sharable(sequence)) if self._shares(sequence) else []
            if keys and not sequence.scoring and self._prefix_in_flight(sequence, keys):
                continue
            match = self.tree.match(keys, namespace)
            if sequence.scoring:  # only what its scores are known for is of use
                notes = self.tree.notes(match)
                match = self.tree.match(
                    keys[: max(len(notes), sequence.request.scores.known // self.page_size)], namespace
                )
            self.tree.lock(match.node)
            needed = self._pages_for(len(sequence.tokens)) - len(match.pages)
            watermark = (len(self.running) + self.pool.size // 100) if self.running else 0
            if needed > self.free_pages - watermark:
                self.tree.unlock(match.node)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.slot = self._slots.pop()
            sequence.node, sequence.pages = match.node, list(match.pages)
            sequence.shared_pages = len(match.pages)
            sequence.computed = len(match.pages) * self.page_size
            request = sequence.request
            if sequence.scoring and match.pages:
                for i, page in enumerate(notes[: len(match.pages)]):
                    request.scores.add(i * self.page_size, page)
                sequence.computed -= 1  # the last cached position scores the first token behind it
            if request.cached_tokens is None:
                request.cached_tokens = sequence.computed
                self.counters.prefix_queries += len(request.prompt)
                self.counters.prefix_hits += sequence.computed
            if request.scheduled_s is None:
                request.scheduled_s = self.now_s
            self.policy.on_admit(sequence, sequence.computed)
            budget -= self._chunk(sequence, budget, rows)

    def _prefix_in_flight(self, sequence: Sequence, keys: list[tuple[int, ...]]) -> bool:
        """Whether a running prompt is about to compute the page `sequence` lacks next: then it pays to wait for it."""
        namespace = self._namespace(sequence)
        have = self.tree.peek(keys, namespace)
        if have == len(keys):
            return False
        for other in self.running:
            if other.computed >= (have + 1) * self.page_size or self._namespace(other) != namespace:
                continue
            theirs = self._keys(other, self._sharable(other))
            if len(theirs) > have and theirs[have] == keys[have] and theirs[:have] == keys[:have]:
                return True
        return False

    def _reserve(self, sequence: Sequence, tokens: int, rows: Rows) -> bool:
        """Pages for the first `tokens` tokens; evicts and preempts as needed. False: `sequence` was preempted."""
        need = self._pages_for(tokens) - len(sequence.pages)
        while need > self.pool.free:
            if self.tree.evict(need - self.pool.free):
                continue
            if self.in_flight:
                raise _Unsettled
            # The first of the first class is never the victim, so that something always finishes.
            first = min(self.running, key=lambda s: (s.priority, s.order))
            others = [s for s in self.running if s is not first]
            last = max(s.priority for s in others)
            victim = self.policy.victim([s for s in others if s.priority == last])
            assert isinstance(victim, Sequence)
            rows.pop(victim, None)
            self.preempt(victim)
            if victim is sequence:
                return False
        if need > 0:
            sequence.pages.extend(self.pool.allocate(need))
        return True

    def _share(self, sequence: Sequence) -> None:
        """Puts the whole computed pages of `sequence` into the tree and locks them there."""
        full = min(sequence.computed, len(sequence.tokens)) // self.page_size
        if not self._shares(sequence) or full <= sequence.shared_pages:
            return
        match = self.tree.insert(self._keys(sequence, full), sequence.pages[:full], self._namespace(sequence))
        for i in range(sequence.shared_pages, full):
            if match.pages[i] != sequence.pages[i]:  # another sequence was first: use its page, free ours
                self._retire([sequence.pages[i]])
                sequence.pages[i] = match.pages[i]
        self.tree.lock(match.node)
        if sequence.node is not None:
            self.tree.unlock(sequence.node)
        sequence.node, sequence.shared_pages = match.node, full

    def _retire(self, pages: list[int]) -> None:
        """Frees private pages once every step launched so far has settled."""
        if self.in_flight:
            self._retired.append((self._steps_launched, pages))
        else:
            self.pool.release(pages)

    def _release(self, sequence: Sequence, *, keep: bool) -> None:
        if keep:
            self._share(sequence)
        self.pool.release(sequence.pages[sequence.shared_pages :])
        if sequence.node is not None:
            self.tree.unlock(sequence.node)
        if not self.prefix_caching and sequence.request.unfinished <= 1:
            self.tree.drop(self._namespace(sequence))
        self._slots.append(sequence.slot)
        sequence.pages, sequence.shared_pages, sequence.node = [], 0, None
        sequence.slot, sequence.computed = -1, 0

    def _shares(self, sequence: Sequence) -> bool:
        pooled = sequence.request.pooled
        if pooled is not None and pooled.whole:
            return False
        return self.prefix_caching or sequence.request.choices > 1

    def _namespace(self, sequence: Sequence) -> Hashable:
        """Who may use the same prefixes: without a prefix cache still the choices of one request."""
        return sequence.request.namespace if self.prefix_caching else sequence.request

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _sharable(self, sequence: Sequence) -> int:
        """Pages that a cache hit may cover: at least one token must be left to compute."""
        return (len(sequence.tokens) - 1) // self.page_size

    def _keys(self, sequence: Sequence, pages: int) -> list[tuple[int, ...]]:
        size, keys = self.page_size, sequence.keys
        given = sequence.request.given
        for i in range(len(keys), pages):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            keys.append(tuple(tokens) if given is None else given.page_key(tokens, i * size))
        return keys if len(keys) == pages else keys[:pages]

    def _path(self, node) -> list[int]:
        """Pages from the root to `node`."""
        pages: list[list[int]] = []
        while node is not None:
            pages.append(node.pages)
            node = node.parent
        return [page for run in reversed(pages) for page in run]
