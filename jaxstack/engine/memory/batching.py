"""Which requests compute together: balanced micro-batches, and slots refilled as answers end.

`batch_requests` is algorithm 2 of MoE-Lightning (arXiv 2411.11217) with the two things that its listing lacks: parts
that are not full are emitted as well, and what does not fit is deferred and not dropped. `RefilledBatches` gives the
slot of an answer that ended to a request that waits, which a batch with one length for all answers cannot do.
"""

import dataclasses
from collections import deque
from collections.abc import Hashable, Iterable, Sequence

from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A request that wants a place: `max_tokens` is the longest answer it may have."""

    id: Hashable
    prompt_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "max_tokens"):
            if not getattr(self, name) >= 1:
                raise UserError(f"request {self.id}: {name}: found {getattr(self, name)}, expected at least 1")

    @property
    def tokens(self) -> int:
        """That its KV may take."""
        return self.prompt_tokens + self.max_tokens


@dataclasses.dataclass(frozen=True)
class Batch:
    """Micro-batches, and the requests for which there was no place, longest prompt first."""

    micro_batches: tuple[tuple[Waiting, ...], ...]
    deferred: tuple[Waiting, ...]


def batch_requests(requests: Iterable[Waiting], *, n_micro_batches: int, micro_batch: int, cache_tokens: int) -> Batch:
    """Long prompts first, each to the micro-batch with the fewest prompt tokens; a full one is closed.

    Args:
      micro_batch: requests of one.
      cache_tokens: KV that one may take, answers included.

    Raises:
      UserError: a request that would fit into no micro-batch, even alone: it would be deferred forever.
    """
    for name, value in (("n_micro_batches", n_micro_batches), ("micro_batch", micro_batch)):
        if value < 1:
            raise UserError(f"{name}: found {value}, expected at least 1")
    queue = sorted(requests, key=lambda request: -request.prompt_tokens)
    for request in queue:
        _could_fit(request, cache_tokens)
    parts: list[list[Waiting]] = [[] for _ in range(n_micro_batches)]
    prompts, answers = [0] * n_micro_batches, [0] * n_micro_batches
    open_parts = list(range(n_micro_batches))
    done: list[list[Waiting]] = []
    deferred = []
    for request in queue:
        if not open_parts:
            deferred.append(request)
            continue
        part = min(open_parts, key=lambda each: prompts[each])
        if prompts[part] + answers[part] + request.tokens > cache_tokens:
            deferred.append(request)
            continue
        parts[part].append(request)
        prompts[part] += request.prompt_tokens
        answers[part] += request.max_tokens
        if len(parts[part]) == micro_batch:
            open_parts.remove(part)
            done.append(parts[part])
    done += [parts[part] for part in open_parts if parts[part]]
    return Batch(tuple(tuple(part) for part in done), tuple(deferred))


def _could_fit(request: Waiting, cache_tokens: int) -> None:
    if request.tokens > cache_tokens:
        raise UserError(
            f"request {request.id}: found {request.tokens} tokens with its answer, expected at most the {cache_tokens} "
            "of a micro-batch"
        )


@dataclasses.dataclass(frozen=True)
class Placed:
    """A request's place."""

    request: Waiting
    micro_batch: int
    slot: int


@dataclasses.dataclass(frozen=True)
class PrefillChunk:
    """Prompt tokens `start` to `start + count` of a request that was given a slot: work of the device in this step."""

    placed: Placed
    start: int
    count: int


class RefilledBatches:
    """Micro-batches whose slots are given to waiting requests as soon as they are free. Arrays keep their shapes.

    A step of decoding is: `fill` the free slots, `prefill` some tokens of the prompts that are not read yet, decode
    those that are (`decoding`), and `finish` what ended. Requests are taken in the order in which they came; a request
    that fits nowhere yet holds up those behind it, so that nobody starves.
    """

    def __init__(self, *, n_micro_batches: int, micro_batch: int, cache_tokens: int):
        for name, value in (("n_micro_batches", n_micro_batches), ("micro_batch", micro_batch)):
            if value < 1:
                raise UserError(f"{name}: found {value}, expected at least 1")
        self.cache_tokens = cache_tokens
        self._slots: list[list[Placed | None]] = [[None] * micro_batch for _ in range(n_micro_batches)]
        self._used = [0] * n_micro_batches
        self._waiting: deque[Waiting] = deque()
        self._unread: deque[tuple[Placed, int]] = deque()
        self._places: dict[Hashable, Placed] = {}

    def add(self, requests: Iterable[Waiting]) -> None:
        """Puts requests into the queue.

        Raises:
          UserError: one that fits into no micro-batch, even alone; none of them is queued then.
        """
        found = list(requests)
        for request in found:
            _could_fit(request, self.cache_tokens)
        self._waiting.extend(found)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._places)

    def used_tokens(self, micro_batch: int) -> int:
        """KV that the requests of a micro-batch may take."""
        return self._used[micro_batch]

    def fill(self) -> list[Placed]:
        """Gives free slots to waiting requests, each in the micro-batch with the fewest tokens."""
        placed = []
        while self._waiting:
            request = self._waiting[0]
            fitting = [
                j
                for j, slots in enumerate(self._slots)
                if None in slots and self._used[j] + request.tokens <= self.cache_tokens
            ]
            if not fitting:
                break
            self._waiting.popleft()
            j = min(fitting, key=lambda each: self._used[each])
            slot = self._slots[j].index(None)
            place = Placed(request, j, slot)
            self._slots[j][slot] = self._places[request.id] = place
            self._used[j] += request.tokens
            self._unread.append((place, 0))
            placed.append(place)
        return placed

    def prefill(self, tokens: int) -> list[PrefillChunk]:
        """At most so many tokens of the prompts that are not read yet, oldest first."""
        chunks = []
        while tokens > 0 and self._unread:
            place, start = self._unread.popleft()
            if self._places.get(place.request.id) is not place:  # it was finished unread
                continue
            count = min(tokens, place.request.prompt_tokens - start)
            chunks.append(PrefillChunk(place, start, count))
            tokens -= count
            if start + count < place.request.prompt_tokens:
                self._unread.appendleft((place, start + count))
        return chunks

    def decoding(self) -> list[list[Placed]]:
        """By micro-batch, the requests whose prompts are read."""
        unread = {place.request.id for place, _ in self._unread}
        return [[p for p in slots if p is not None and p.request.id not in unread] for slots in self._slots]

    def finish(self, request: Hashable) -> Placed:
        """Frees the slot of a request that ended, or was aborted; the next `fill` may give it away.

        Raises:
          KeyError: it has no slot.
        """
        place = self._places.pop(request)
        self._slots[place.micro_batch][place.slot] = None
        self._used[place.micro_batch] -= place.request.tokens
        return place

    def cancel(self, request: Hashable) -> bool:
        """Takes a request out of the queue; False: it is not there."""
        before = len(self._waiting)
        self._waiting = deque(each for each in self._waiting if each.id != request)
        return len(self._waiting) < before


def decode_steps(
    requests: Sequence[Waiting],
    answers: Sequence[int],
    *,
    n_micro_batches: int,
    micro_batch: int,
    cache_tokens: int,
    refill: bool,
    prefill_tokens: int = 2**31,
) -> int:
    """Steps that decode all of `requests`, the i-th of which ends after `answers[i]` tokens (at least 1).

    Args:
      refill: False: batch after batch by algorithm 2, each until its longest answer ends.
      prefill_tokens: that a step reads, with refill.
    """
    lengths = {request.id: length for request, length in zip(requests, answers)}
    steps = 0
    if not refill:
        left: Sequence[Waiting] = requests
        while left:
            batch = batch_requests(
                left, n_micro_batches=n_micro_batches, micro_batch=micro_batch, cache_tokens=cache_tokens
            )
            steps += max(lengths[request.id] for part in batch.micro_batches for request in part)
            left = batch.deferred
        return steps
    batches = RefilledBatches(n_micro_batches=n_micro_batches, micro_batch=micro_batch, cache_tokens=cache_tokens)
    batches.add(requests)
    while batches.waiting or batches.running:
        batches.fill()
        batches.prefill(prefill_tokens)
        for part in batches.decoding():
            for place in part:
                lengths[place.request.id] -= 1
                if lengths[place.request.id] <= 0:
                    batches.finish(place.request.id)
        steps += 1
    return steps
