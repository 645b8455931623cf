"""Which pages of which layer's feed-forward weights are where: always on the device, or on their way through it.

A page is identified by its layer and its number there (`jaxstack.models.paged_experts` says what is in it). Of each
layer a share of the pages stays on the device; the others are streamed through a few buffers, layer after layer, as the
schedule says. The table holds no numbers, only where they are, and refuses whatever a schedule must not do.
"""

import collections
import enum
from collections.abc import Sequence

from jaxstack.runtime.errors import UserError


class PageState(enum.Enum):
    """Where a page can be read."""

    RESIDENT = "on the device for good"
    HOST = "on the host only"
    MOVING = "on its way to the device"
    DEVICE = "on the device until it is freed"


class PageTable:
    """The state of every page.

    Args:
      pages: how many each layer has.
      resident_share: of each layer's pages, those that stay on the device, rounded down to whole ones.
      transfers: in how many pieces a layer's other pages are streamed.

    Raises:
      UserError: a share outside 0 to 1.
    """

    def __init__(self, pages: Sequence[int], resident_share: float, transfers: int):
        if not 0 <= resident_share <= 1:
            raise UserError(f"weight_resident: found {resident_share}, expected a share from 0 to 1")
        self.pages = tuple(pages)
        self.transfers = transfers
        self._resident = [_spread(count, int(count * resident_share + 1e-9)) for count in pages]
        self._state = {
            (layer, page): PageState.RESIDENT if page in self._resident[layer] else PageState.HOST
            for layer, count in enumerate(pages)
            for page in range(count)
        }

    def resident(self, layer: int) -> tuple[int, ...]:
        return self._resident[layer]

    def streamed(self, layer: int) -> tuple[int, ...]:
        stay = set(self._resident[layer])
        return tuple(page for page in range(self.pages[layer]) if page not in stay)

    def transfer(self, layer: int, number: int) -> tuple[int, ...]:
        """The pages that transfer `number` of the layer brings; they differ by at most one between transfers."""
        streamed = self.streamed(layer)
        start, end = (len(streamed) * n // self.transfers for n in (number, number + 1))
        return streamed[start:end]

    def state(self, layer: int, page: int) -> PageState:
        return self._state[layer, page]

    def counts(self) -> collections.Counter[PageState]:
        return collections.Counter(self._state.values())

    def begin(self, layer: int, pages: Sequence[int]) -> None:
        """They set out for the device."""
        self._move(layer, pages, PageState.HOST, PageState.MOVING)

    def arrive(self, layer: int, pages: Sequence[int]) -> None:
        self._move(layer, pages, PageState.MOVING, PageState.DEVICE)

    def free(self, layer: int, pages: Sequence[int]) -> None:
        """Their place on the device is wanted for others."""
        self._move(layer, pages, PageState.DEVICE, PageState.HOST)

    def check_readable(self, layer: int) -> None:
        """Raises RuntimeError unless the whole layer can be read on the device."""
        for page in range(self.pages[layer]):
            if (state := self._state[layer, page]) not in (PageState.RESIDENT, PageState.DEVICE):
                raise RuntimeError(f"page {page} of layer {layer} is {state.value}, and is about to be read")

    def reset(self) -> None:
        """Nothing is on the device but what stays there: after a step that failed."""
        for key, state in self._state.items():
            if state is not PageState.RESIDENT:
                self._state[key] = PageState.HOST

    def _move(self, layer: int, pages: Sequence[int], before: PageState, after: PageState) -> None:
        for page in pages:
            if (found := self._state[layer, page]) is not before:
                raise RuntimeError(
                    f"page {page} of layer {layer} is {found.value}, expected {before.value} where it is about to be "
                    f"{after.value}"
                )
        for page in pages:
            self._state[layer, page] = after


def _spread(count: int, chosen: int) -> tuple[int, ...]:
    """`chosen` of `count`, evenly apart."""
    return tuple(i for i in range(count) if (i + 1) * chosen // count > i * chosen // count)
