"""Which replica is believed to hold which prefix: one tree for all replicas, whose nodes carry a mark for each.

A node is a key (`serving/prefix_keys.py`): cumulative, so that a key alone says where it stands, and a look-up is a
dictionary's. A mark says that a request with this prefix went to a replica, and when one last did. Marks are
prefix-closed: whoever has a mark has one on every node above. So the depth of a replica is found by bisection, a
logarithm of look-ups however long the prompt.

Beliefs go wrong in three ways, each with its remedy: a replica evicts (it reports, and `evict` takes the marks below
too), it restarts (`forget` begins a new epoch, in which old marks count for nothing), or a report is lost (marks unseen
for `expiry_s` count no more).
"""

import collections
from collections.abc import Iterable, Sequence


class _Node:
    __slots__ = ("children", "key", "marks", "parent")

    def __init__(self, key: int, parent: "_Node | None"):
        self.key, self.parent = key, parent
        self.marks: dict[int, _Mark] = {}
        self.children: set[_Node] | None = None


class _Mark:
    """Of one replica in one epoch (`owner`) on one node."""

    __slots__ = ("node", "owner", "seen_s")

    def __init__(self, node: _Node, owner: int, seen_s: float):
        self.node, self.owner, self.seen_s = node, owner, seen_s


class PrefixTree:
    """See the module's docstring. Times are seconds of any clock that does not go back.

    Args:
      expiry_s: how long a mark counts that is not seen again.
      max_marks: beyond it the marks not seen for longest are dropped.
    """

    def __init__(self, *, expiry_s: float = 600.0, max_marks: int = 500_000):
        self._expiry_s, self._max_marks = expiry_s, max_marks
        self._nodes: dict[int, _Node] = {}
        # A replica in its present epoch; marks of older ones are still on nodes, until they expire.
        self._owner: dict[str, int] = {}
        self._sizes: dict[int, int] = {}
        self._epochs = 0
        self._count = 0
        # Every mark stands here once, with the time at which it had been seen when it was put here.
        self._queue: collections.deque[tuple[float, _Mark]] = collections.deque()

    def __len__(self) -> int:
        """Marks on all nodes, those of past epochs included."""
        return self._count

    def size(self, replica: str) -> int:
        """Nodes that carry the replica's mark."""
        return self._sizes.get(self._owner.get(replica, -1), 0)

    def insert(self, keys: Iterable[int], replica: str, now_s: float) -> None:
        """Marks a prompt's keys, from its beginning on, as seen by `replica` now."""
        owner = self._owner.get(replica)
        if owner is None:
            owner = self._owner[replica] = self._epochs
            self._epochs += 1
            self._sizes[owner] = 0
        nodes, queue, fresh, parent = self._nodes, self._queue, 0, None
        for key in keys:
            node = nodes.get(key)
            if node is None:
                node = nodes[key] = _Node(key, parent)
                if parent is not None:
                    if parent.children is None:
                        parent.children = set()
                    parent.children.add(node)
            mark = node.marks.get(owner)
            if mark is None:
                mark = node.marks[owner] = _Mark(node, owner, now_s)
                fresh += 1
                queue.append((now_s, mark))
            else:
                mark.seen_s = now_s
            parent = node
        self._sizes[owner] += fresh
        self._count += fresh
        self._expire(now_s)

    def match(self, keys: Sequence[int], replicas: Iterable[str], now_s: float) -> dict[str, int]:
        """For each replica how many leading keys carry its mark."""
        nodes, since = self._nodes, now_s - self._expiry_s
        known, beyond = 0, len(keys)
        while known < beyond:
            middle = (known + beyond + 1) // 2
            if keys[middle - 1] in nodes:
                known = middle
            else:
                beyond = middle - 1
        depths = {}
        for replica in replicas:
            owner = self._owner.get(replica, -1)
            low, high = 0, known
            probe = known  # the likeliest: whoever has the beginning has it all
            while low < high:
                mark = nodes[keys[probe - 1]].marks.get(owner)
                if mark is not None and mark.seen_s >= since:
                    low = probe
                else:
                    high = probe - 1
                probe = (low + high + 1) // 2
            depths[replica] = low
        return depths

    def evict(self, keys: Iterable[int], replica: str) -> None:
        """Takes the replica's marks off these keys and off all that go on from them."""
        owner = self._owner.get(replica, -1)
        for key in keys:
            node = self._nodes.get(key)
            if node is not None and owner in node.marks:
                self._drop(node, owner)

    def forget(self, replica: str) -> None:
        """The replica holds nothing any more."""
        owner = self._owner.pop(replica, None)
        if owner is not None:
            self._sizes.pop(owner)

    def _drop(self, node: _Node, owner: int) -> None:
        below = [node]
        for each in below:  # grows as it goes
            below.extend(child for child in each.children or () if owner in child.marks)
        for each in reversed(below):  # children before parents
            del each.marks[owner]
            if not each.marks:
                del self._nodes[each.key]
                if each.parent is not None and each.parent.children is not None:
                    each.parent.children.discard(each)
        self._count -= len(below)
        if owner in self._sizes:
            self._sizes[owner] -= len(below)

    def _expire(self, now_s: float) -> None:
        """Drops what has expired, and what is too much. A mark passes here once in `expiry_s`."""
        if len(self._queue) > 2 * self._count + 1000:  # most of it is of marks that have been evicted
            self._queue = collections.deque(entry for entry in self._queue if _on_node(entry[1]))
        queue, since = self._queue, now_s - self._expiry_s
        while queue and (queue[0][0] < since or self._count > self._max_marks):
            stamp, mark = queue.popleft()
            if not _on_node(mark):
                continue
            if mark.seen_s > stamp:
                queue.append((mark.seen_s, mark))
            else:
                self._drop(mark.node, mark.owner)


def _on_node(mark: _Mark) -> bool:
    return mark.node.marks.get(mark.owner) is mark
