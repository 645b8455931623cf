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
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq

from jaxstack.engine.memory import PagePool, RadixTree
from jaxstack.engine.prefixes import Prefixes
from jaxstack.engine.request import Sequence
from jaxstack.engine.scheduling import Admission, Policy, PrefixLengths, Room, Steward
from jaxstack.engine.speculate import Drafter
from jaxstack.engine.step_plan import Row, StepPlan
from jaxstack.runtime.errors import UserError

Rows = dict[Sequence, list[Row]]


class _Unsettled(Exception):
    """Pages are short, and the step in flight must settle before anything can be taken from anyone."""


@dataclasses.dataclass
class SchedulerCounters:
    """Running totals since the start. Prefix figures are in tokens. `recomputed_tokens` had been computed before a
    preemption and were again after it: nobody is charged for them twice.
    """

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    drafted_tokens: int = 0
    accepted_drafts: int = 0


class Scheduler:
    """Owns the waiting and running sequences, the page pool and the prefix cache.

    Args:
      policy: admits the waiting sequences and picks victims.
      num_pages, page_size: the KV cache. A sequence must fit alone: the engine refuses others when they arrive.
      max_sequences: sequences running at once (rows of a step).
      max_batch_tokens: tokens of one step, at least `max_sequences`.
      prefix_caching: keep finished prefixes for reuse.
      max_rows: sampled rows of a step, drafts included; `max_sequences` by default.
      speculation: draft tokens a sequence may have in a step (`speculate.py`).
      speculation_rows: nobody drafts where that would give a step more rows than this.
      reserve: admit a sequence only if the pages of its longest answer are free too, so that nobody is preempted and
        debts stay smaller, at the price of smaller batches.
      clock: seconds, monotonic; a simulator passes its own.
      pool: of `num_pages` pages, all free; by default a new one.

    Attributes:
      steward: tells the policy what happens; keeps the clients' accounts and the fairness certificate.
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
        reserve: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        pool: PagePool | None = None,
    ):
        self.page_size = page_size
        self.max_sequences = max_sequences
        self.max_batch_tokens = max_batch_tokens
        self.speculation = speculation
        self.pool = pool or PagePool(num_pages)
        self.tree = RadixTree(self.pool)
        self._prefixes = Prefixes(self.tree, page_size, prefix_caching)
        self.reserve = reserve
        rows = max(max_rows, max_sequences)
        self.steward = Steward(
            policy,
            Room(max_sequences, num_pages * page_size, reserve, in_flight=rows, lock_step=not speculation),
        )
        self.speculation_rows = min(speculation_rows, rows)
        self._lengths = PrefixLengths(self.tree, self._prefixes.extend)
        self._preempted: dict[Sequence, int] = {}  # that wait again, and how many tokens they had computed
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.closing: list[Sequence] = []  # finished, but a launched step still writes their pages
        self.counters = SchedulerCounters()
        self._clock = clock
        self._slots = list(range(max_sequences - 1, -1, -1))
        self._budget = 0  # tokens that the step being planned has left for new sequences
        self._steps_launched = self._steps_settled = 0
        # Pages to free once the step of that number has settled.
        self._retired: collections.deque[tuple[int, list[int]]] = collections.deque()

    @property
    def policy(self) -> Policy:
        """May be replaced between two steps."""
        return self.steward.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self.steward.policy = policy

    # What a policy may look at (`SchedulerView`).

    @property
    def now_s(self) -> float:
        return self._clock()

    @property
    def free_pages(self) -> int:
        return self.pool.free + self.tree.evictable

    @property
    def full(self) -> bool:
        """Whether nothing more goes into the step being planned."""
        return self._budget <= 0 or not self._slots

    @property
    def waiting_clients(self) -> Mapping[str, int]:
        """How many sequences of each client wait; only those with some."""
        return self.steward.accounts.waiting

    def cached_tokens(self, request: Sequence) -> int:
        """Tokens of `request` that the prefix cache holds now."""
        keys = self._prefixes.keys(request)
        return self.tree.peek(keys, self._prefixes.namespace(request)) * self.page_size

    def prefix_lengths(self, waiting: Seq[Sequence]) -> list[int]:
        """`cached_tokens` of each of the waiting sequences, without a walk through the tree for each; 0 for those that
        may not use the cache.
        """
        return [pages * self.page_size for pages in self._lengths.of(waiting)]

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
        # The last token drawn is never computed.
        needed = self._pages_for(max(1, sequence.prompt_tokens + sequence.max_tokens - 1))
        if needed > self.pool.size:  # waiting for ever, it would hold up the refills of all others
            raise UserError(
                f"prompt: found {sequence.prompt_tokens} tokens and max_tokens = {sequence.max_tokens}, which need "
                f"{needed} pages, expected at most num_pages = {self.pool.size}"
            )
        self.steward.arrived(sequence, self)
        self.waiting.append(sequence)

    def take_over(self, old: "Scheduler", again: Seq[Sequence] = ()) -> None:
        """Goes on where `old`, which has the same policy, has to stop. Nothing runs there, but for those of `again`:
        they wait once more, with the tokens that have been read, and all pages lost.
        """
        self.waiting, self.counters, self.steward = old.waiting, old.counters, old.steward
        self._preempted = old._preempted
        for sequence in again:
            self._preempted[sequence] = sequence.computed
            sequence.pages, sequence.shared_pages, sequence.node = [], 0, None
            sequence.slot, sequence.computed, sequence.pending, sequence.in_flight = -1, 0, 0, 0
            self.waiting.append(sequence)
            self.steward.preempted(sequence)
            self.counters.preemptions += 1

    def plan(self) -> StepPlan | None:
        """The next step's rows, with pages allocated for every one of them. Empty when there is nothing to do.

        None: pages are short and a step is in flight. Settle it (it may free some), then plan again.
        """
        rows: Rows = {}
        try:
            self._fill(rows)
        except _Unsettled:
            return None
        self.steward.stepped(one_priority=len(self._priorities()) < 2, now_s=self.now_s)
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
            if row.start < len(sequence.request.prompt):
                self.steward.computes(sequence, row.start + row.count)
            if row.count > 1 or not row.samples:
                self._share(sequence)

    def settled(self, plan: StepPlan) -> None:
        """The oldest step in flight is over. Its drawn tokens are the caller's to append to `Sequence.tokens`, except
        those of sequences that have finished meanwhile.
        """
        self._steps_settled += 1
        generated: collections.Counter[str] = collections.Counter()
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
                if row.samples and sequence.request.pooled is None:
                    generated[sequence.client] += 1
        self.steward.generated(generated)
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
        self.steward.generated({sequence.client: 1})
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
            self._waits_no_more(sequence)
            self._preempted.pop(sequence, None)
        else:
            self.running.remove(sequence)
            if sequence.in_flight:
                self.closing.append(sequence)
            else:
                self._release(sequence, keep=sequence.finish_reason != "error")
        self.steward.left(sequence, last=sequence.request.unfinished <= 1)

    def preempt(self, sequence: Sequence) -> None:
        """`sequence` gives up its pages and waits again; it will recompute what the prefix cache has lost by then."""
        assert not self.in_flight
        self._preempted[sequence] = sequence.computed
        self._release(sequence, keep=True)
        self.running.remove(sequence)
        self.waiting.append(sequence)
        self.steward.preempted(sequence)
        self.counters.preemptions += 1
        self.pool.shortages += 1

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
        while self.pool.overdrawn and self._give_up(self.pool.overdrawn):
            pass
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
            self._budget = budget
            self._admit(rows)

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

    def _admit(self, rows: Rows) -> None:
        """Lets the policy start sequences, those of the first priority first, and plans their first tokens."""
        short = False

        def try_admit(sequence: Sequence) -> Admission:
            nonlocal short
            if self.full:
                return Admission.FULL
            admission = self._start(sequence)
            if admission is Admission.NO_ROOM and not short:
                short = True
                self.pool.shortages += 1
            if admission is Admission.ADMITTED:
                self._budget -= self._chunk(sequence, self._budget, rows)
            return admission

        for group in self._by_priority():
            self.steward.schedule(group, self, try_admit)
            if short or self.full:
                return

    def _priorities(self) -> list[int]:
        """Of those that wait, the first to go first."""
        return sorted({sequence.request.priority for sequence in self.waiting})

    def _by_priority(self) -> Iterator[list[Sequence]]:
        priorities = self._priorities()
        for priority in priorities:
            yield [s for s in self.waiting if len(priorities) == 1 or s.request.priority == priority]

    def _start(self, sequence: Sequence) -> Admission:
        """Makes a waiting sequence a running one, if there are pages for it."""
        if sequence.slot >= 0 or sequence.finish_reason is not None:
            return Admission.GONE
        namespace = self._prefixes.namespace(sequence)
        keys = self._prefixes.keys(sequence) if self._prefixes.shares(sequence) else []
        if keys and not sequence.scoring and self._prefix_in_flight(sequence, keys):
            return Admission.LATER
        room = self.free_pages - self._set_aside()
        if self._needed(sequence) - self._lengths.of((sequence,))[0] > room:
            return Admission.NO_ROOM
        match = self.tree.match(keys, namespace)
        request = sequence.request
        if sequence.scoring:  # only what its scores are known for is of use
            notes = self.tree.notes(match)
            match = self.tree.match(keys[: max(len(notes), request.scores.known // self.page_size)], namespace)
        self.tree.lock(match.node)  # what it holds is not free any more
        if self._needed(sequence) - len(match.pages) > self.free_pages - self._set_aside():
            self.tree.unlock(match.node)
            return Admission.NO_ROOM
        self.waiting.remove(sequence)
        self._waits_no_more(sequence)
        self.running.append(sequence)
        sequence.slot = self._slots.pop()
        sequence.node, sequence.pages = match.node, list(match.pages)
        sequence.shared_pages = len(match.pages)
        sequence.computed = len(match.pages) * self.page_size
        if sequence.scoring and match.pages:
            for i, page in enumerate(notes[: len(match.pages)]):
                request.scores.add(i * self.page_size, page)
            sequence.computed -= 1  # the last cached position scores the first token behind it
        self.counters.recomputed_tokens += max(0, self._preempted.pop(sequence, 0) - sequence.computed)
        if request.scheduled_s is None:
            request.scheduled_s = self.now_s
        if request.cached_tokens is None:
            # Of a prompt whose answer goes on, what is cached may reach into the answer.
            request.cached_tokens = cached = min(sequence.computed, len(request.prompt))
            self.counters.prefix_queries += len(request.prompt)
            self.counters.prefix_hits += cached
            self.steward.started(sequence, cached, request.scheduled_s - request.arrival_s)
        return Admission.ADMITTED

    def _needed(self, sequence: Sequence) -> int:
        """Pages to be free for `sequence` to start, its cached ones included."""
        longest = sequence.prompt_tokens + sequence.max_tokens - 1 if self.reserve else 0
        return self._pages_for(max(len(sequence.tokens), longest))

    def _set_aside(self) -> int:
        """Free pages that no new sequence may take: those promised to running ones, or a few for their next tokens."""
        if self.reserve:
            return self.pool.withheld + sum(max(0, self._needed(s) - len(s.pages)) for s in self.running)
        return self.pool.withheld + len(self.running) + self.pool.size // 100 if self.running else 0

    def _waits_no_more(self, sequence: Sequence) -> None:
        self._lengths.forget(sequence)
        self.steward.accounts.waits_no_more(sequence.client)

    def _prefix_in_flight(self, sequence: Sequence, keys: list[tuple[int, ...]]) -> bool:
        """Whether a running prompt is about to compute the page `sequence` lacks next: then it pays to wait for it."""
        namespace = self._prefixes.namespace(sequence)
        have = self._lengths.of((sequence,))[0]
        if have == len(keys):
            return False
        for other in self.running:
            if other.computed >= (have + 1) * self.page_size or self._prefixes.namespace(other) != namespace:
                continue
            theirs = self._prefixes.keys(other)
            if len(theirs) > have and theirs[have] == keys[have] and theirs[:have] == keys[:have]:
                return True
        return False

    def _reserve(self, sequence: Sequence, tokens: int, rows: Rows) -> bool:
        """Pages for the first `tokens` tokens; evicts and preempts as needed. False: `sequence` was preempted."""
        need = self._pages_for(tokens) - len(sequence.pages)
        while need > self.pool.free:
            victim = self._give_up(need - self.pool.free)
            assert victim is not False, "a sequence that runs alone does not fit"
            if isinstance(victim, Sequence):
                rows.pop(victim, None)
            if victim is sequence:
                return False
        if need > 0:
            sequence.pages.extend(self.pool.allocate(need))
        return True

    def _give_up(self, count: int) -> Sequence | bool:
        """Has the cache give up `count` pages, or else a running sequence all of its own, which is returned. False:
        there is nobody who could.
        """
        if self.tree.evict(count):
            return True
        if self.in_flight:
            raise _Unsettled
        # The first of the first class is never the victim, so that something always finishes.
        first = min(self.running, key=lambda s: (s.priority, s.order), default=None)
        others = [s for s in self.running if s is not first]
        if not others:
            return False
        last = max(s.priority for s in others)
        victim = self.steward.victim([s for s in others if s.priority == last])
        self.preempt(victim)
        return victim

    def _share(self, sequence: Sequence) -> None:
        """Puts the whole computed pages of `sequence` into the tree and locks them there."""
        full = min(sequence.computed, len(sequence.tokens)) // self.page_size
        if not self._prefixes.shares(sequence) or full <= sequence.shared_pages:
            return
        match = self.tree.insert(
            self._prefixes.keys(sequence, full), sequence.pages[:full], self._prefixes.namespace(sequence)
        )
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
        if not self._prefixes.caching and sequence.request.unfinished <= 1:
            self.tree.drop(self._prefixes.namespace(sequence))
        self._slots.append(sequence.slot)
        sequence.pages, sequence.shared_pages, sequence.node = [], 0, None
        sequence.slot, sequence.computed = -1, 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _path(self, node) -> list[int]:
        """Pages from the root to `node`."""
        pages: list[list[int]] = []
        while node is not None:
            pages.append(node.pages)
            node = node.parent
        return [page for run in reversed(pages) for page in run]
