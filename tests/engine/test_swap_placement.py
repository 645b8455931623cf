"""Where pages are: each is in exactly one state always, and what is read has arrived and is what was written.

The state machine keeps contents beside the places, as arrays would: device slots, chunks on the host, and places on the
device that chunks are copied to.
"""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jaxstack.engine.memory.pages import Owner
from jaxstack.engine.memory.swap import PageSpaces
from jaxstack.engine.memory.swap.placement import OutOfSlots, to_demote

DEVICE, HOST, CHUNK = 6, 9, 3


class Swapping(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.spaces = PageSpaces(DEVICE, HOST, CHUNK)
        self.slots = {}  # slot -> content
        self.host = {}  # chunk -> contents
        self.staged = {}  # chunk -> contents, as copied when the fetch began
        self.content = {}  # page -> what it must hold
        self.full = set()
        self.sequences = []  # lists of pages
        self.shared = []  # lists of pages that the tree owns
        self.clock = 0

    def write(self, page):
        self.clock += 1
        self.content[page] = self.slots[self.spaces.slot(page)] = self.clock

    @rule(count=st.integers(1, 3))
    def admit(self, count):
        if self.spaces.free < count or self.spaces.free_slots < count:
            return
        pages = self.spaces.allocate(count)
        self.spaces.bind(pages)
        for page in pages:
            self.write(page)
        self.sequences.append(pages)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def append(self, data):
        pages = data.draw(st.sampled_from(self.sequences))
        self.full.update(pages)
        self.spaces.note_full(pages)
        if self.spaces.free and self.spaces.free_slots:
            (page,) = self.spaces.allocate(1)
            self.spaces.bind([page])
            self.write(page)
            pages.append(page)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def finish_or_abort(self, data):
        pages = self.sequences.pop(data.draw(st.integers(0, len(self.sequences) - 1)))
        self.forget(pages)
        self.spaces.release(pages)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def share_prefix(self, data):
        pages = data.draw(st.sampled_from(self.sequences))
        prefix = [page for page in pages if page in self.full]
        if prefix:
            self.spaces.give_to_tree(prefix)
            self.shared.append(prefix)
            pages[:] = [page for page in pages if page not in prefix]

    @precondition(lambda self: self.shared)
    @rule(data=st.data())
    def evict(self, data):
        pages = self.shared.pop(data.draw(st.integers(0, len(self.shared) - 1)))
        self.forget(pages)
        self.spaces.release(pages, Owner.TREE)

    def forget(self, pages):
        for page in pages:
            self.content.pop(page, None)
            self.full.discard(page)

    @rule(count=st.integers(1, 4))
    def demote(self, count):
        cold = [page for prefix in self.shared for page in prefix]
        groups = to_demote(self.spaces, count, cold, [[p for p in s if p in self.full] for s in self.sequences], set())
        before = self.spaces.free_slots
        for group in groups:
            taken = [self.slots[slot] for slot in self.spaces.slots_of(group)]
            self.host[self.spaces.demote(group)] = taken + [None] * (CHUNK - len(taken))
        assert self.spaces.free_slots == before + sum(map(len, groups))
        reachable = [p for p in self.full if self.spaces.slot(p) is not None]
        assert self.spaces.free_slots - before >= count or not reachable

    @rule(data=st.data())
    def fetch(self, data):
        chunks = [c for c in self.host if c not in self.staged and self.living(c)]
        if chunks:
            chunk = data.draw(st.sampled_from(chunks))
            self.spaces.hold(chunk)
            self.staged[chunk] = list(self.host[chunk])

    @precondition(lambda self: self.staged)
    @rule(data=st.data())
    def free_place(self, data):
        chunk = data.draw(st.sampled_from(sorted(self.staged)))
        del self.staged[chunk]
        self.spaces.unhold(chunk)
        self.drop()

    def living(self, chunk):
        try:
            return any(page >= 0 for page in self.spaces.chunk(chunk))
        except KeyError:
            return False

    @precondition(lambda self: self.staged)
    @rule(data=st.data())
    def promote(self, data):
        chunk = data.draw(st.sampled_from(sorted(self.staged)))
        pages = [page for page in self.spaces.chunk(chunk) if page >= 0]
        if len(pages) > self.spaces.free_slots:
            with pytest.raises(OutOfSlots):
                self.spaces.promote(pages)
            return
        where = [i for i, page in enumerate(self.spaces.chunk(chunk)) if page >= 0]
        for slot, index in zip(self.spaces.promote(pages), where):
            self.slots[slot] = self.staged[chunk][index]

    @rule()
    def compact(self):
        pair = self.spaces.mergeable(c for c in self.staged if self.living(c))
        if pair is None:
            alive = [c for c in self.staged if self.living(c)]
            if len(alive) < 2:
                return
            pair = self.spaces.emptiest(alive)
        kept = [self.staged[c][i] for c in pair for i, page in enumerate(self.spaces.chunk(c)) if page >= 0]
        for number, chunk in enumerate(self.spaces.compact(*pair)):
            part = kept[number * CHUNK : (number + 1) * CHUNK]
            self.host[chunk] = part + [None] * (CHUNK - len(part))

    @rule(data=st.data())
    def a_copy_fails(self, data):
        chunks = [c for c in self.host if self.living(c)]
        if not chunks:
            return
        lost = set(self.spaces.lose(data.draw(st.sampled_from(chunks))))
        # Whoever read them computes them anew: they are released as ever, being nowhere.
        for group, owner in ((self.sequences, Owner.PRIVATE), (self.shared, Owner.TREE)):
            for pages in [g for g in group if lost & set(g)]:
                group.remove(pages)
                self.forget(pages)
                self.spaces.release(pages, owner)

    @rule()
    def drop(self):
        for chunk in self.spaces.dropped():
            assert chunk not in self.staged, "a chunk was dropped while a copy of it was under way"
            del self.host[chunk]

    @invariant()
    def everything_is_where_it_says(self):
        self.spaces.check()
        assert self.spaces.free + self.spaces.tree + self.spaces.private == self.spaces.size
        assert self.spaces.on_device + self.spaces.on_host == len(self.content)
        table = self.spaces.slot_table(DEVICE)
        letters = self.spaces.spaces()
        for page, content in self.content.items():
            slot, place = self.spaces.slot(page), self.spaces.place(page)
            assert (slot is None) != (place is None)
            if slot is not None:
                assert self.slots[slot] == content and table[page] == slot and letters[page] == ord("d")
            else:
                assert self.host[place.chunk][place.offset] == content
                assert table[page] == DEVICE and letters[page] == ord("h")
                assert self.spaces.chunks_of(np.array([page])) == [place.chunk]
        assert self.spaces.count_on_host(np.arange(self.spaces.size)) == self.spaces.on_host

    def teardown(self):
        for pages in self.sequences:
            self.spaces.release(pages)
        for pages in self.shared:
            self.spaces.release(pages, Owner.TREE)
        for chunk in list(self.staged):
            self.spaces.unhold(chunk)
        for chunk in self.spaces.dropped():
            self.host.pop(chunk)
        self.spaces.check()
        assert self.spaces.free == self.spaces.size and self.spaces.free_slots == DEVICE
        assert not self.spaces.chunks and not self.host


TestSwapping = Swapping.TestCase
TestSwapping.settings = settings(
    max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_who_leaves_first():
    spaces = PageSpaces(12, 12, 4)
    pages = spaces.allocate(12)
    spaces.bind(pages)
    short, long, cold = pages[:3], pages[3:9], pages[9:11]
    # What nobody reads, then the longest from its beginning; never what the step writes.
    assert to_demote(spaces, 1, cold, [short, long], frozenset()) == [cold]
    assert to_demote(spaces, 4, cold, [short, long], frozenset()) == [cold, long[:4]]
    assert to_demote(spaces, 9, cold, [short, long], frozenset(long[:1])) == [cold, long[1:5], long[5:] + short]
    assert to_demote(spaces, 1, [], [long, long], frozenset()) == [long[:4]]


def test_pages_that_are_withheld_are_asked_back_only_if_it_is_urgent():
    spaces = PageSpaces(4, 4, 2)
    spaces.allocate(7)
    spaces.withheld = 3
    assert spaces.overdrawn == 0
    spaces.urgent = True
    assert spaces.overdrawn == 2
    spaces.bind(range(4))
    with pytest.raises(OutOfSlots):
        spaces.bind([5])
