"""Which LoRA adapters a replica holds, in which slots, and who uses them. Plain bookkeeping; the arrays are the
runner's.

A name means one adapter from `load` until `unload`. Requests hold the adapter they were made with: an adapter that is
unloaded takes no new requests, and its slot is free again when the last of its requests has ended.
"""

import dataclasses
import itertools
import threading
from collections.abc import Hashable

from jaxstack.engine.errors import UnknownAdapter
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(eq=False)
class Adapter:
    """A loaded adapter.

    Attributes:
      name: what requests call it.
      slot: its row in the stacks, from 1.
      number: no two adapters ever loaded share it; cached prefixes are kept apart by it.
      users: open requests.
      leaving: unloaded; gone when `users` is 0.
      namespaces: of its cached prefixes.
    """

    name: str
    slot: int
    number: int
    users: int = 0
    leaving: bool = False
    namespaces: set[Hashable] = dataclasses.field(default_factory=set)

    def namespace(self, of_request: Hashable) -> Hashable:
        """Where a request of this adapter keeps its cached prefixes: apart from those of any other adapter."""
        made = (self.number, of_request)
        self.namespaces.add(made)
        return made


class AdapterRegistry:
    """Names and slots. Slot 0 is "no adapter" and never given out. Callable from any thread.

    Args:
      max_adapters: slots.
    """

    def __init__(self, max_adapters: int):
        self.max_adapters = max_adapters
        self._by_name: dict[str, Adapter] = {}
        self._free = list(range(max_adapters, 0, -1))
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def find(self, name: str) -> Adapter:
        """Raises UnknownAdapter."""
        adapter = self._by_name.get(name)
        if adapter is None:
            known = ", ".join(self._by_name) or "none"
            raise UnknownAdapter(f"adapter: found {name!r}, expected one that is loaded ({known})")
        return adapter

    def check_room(self, name: str) -> None:
        """Raises UserError unless an adapter of that name could be loaded now."""
        if not name:
            raise UserError("adapter: found an empty name, expected some text")
        if name in self._by_name:
            raise UserError(f"adapter: {name!r} is loaded already; unload it first")
        if not self.max_adapters:
            raise UserError(f"adapter: {name!r} cannot be loaded: found max_adapters = 0, expected at least 1")
        if not self._free:
            known = ", ".join(self._by_name) or "all of them still in use by open requests"
            raise UserError(
                f"adapter: {name!r} cannot be loaded: all max_adapters = {self.max_adapters} slots are taken ({known})"
            )

    def load(self, name: str) -> Adapter:
        """Gives a new adapter a slot. Raises UserError as `check_room` does."""
        with self._lock:
            self.check_room(name)
            adapter = self._by_name[name] = Adapter(name, self._free.pop(), next(self._numbers))
            return adapter

    def unload(self, name: str) -> Adapter:
        """Takes the name away; the slot follows when nobody uses it. Raises UnknownAdapter."""
        with self._lock:
            adapter = self.find(name)
            del self._by_name[name]
            adapter.leaving = True
            self._settle(adapter)
            return adapter

    def acquire(self, name: str) -> Adapter:
        """A request of this adapter begins. Raises UnknownAdapter."""
        with self._lock:
            adapter = self.find(name)
            adapter.users += 1
            return adapter

    def release(self, adapter: Adapter) -> None:
        """A request of this adapter has ended."""
        with self._lock:
            adapter.users -= 1
            self._settle(adapter)

    def _settle(self, adapter: Adapter) -> None:
        if adapter.leaving and not adapter.users:
            self._free.append(adapter.slot)
