"""How a budget of device bytes is divided into slots for pages and room for what streams past."""

import dataclasses

from jaxstack.engine.memory.swap.config import SwapConfig
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class SpacePlan:
    """Sizes that a share on the host comes to.

    Attributes:
      device_slots: pages on the device, beside one more that padding rows write.
      host_pages: pages on the host at once.
      chunk_pages: pages of a chunk.
      chunks: that a layer's segment has at most.
      step_pages: that one step may write.
      new_chunks: that leave the device in one step at most, while their copies are under way.
      group: layers that are launched, and whose slices of a chunk move, together.
      device_bytes: of all that, at most.
      host_bytes: of the chunks.
    """

    device_slots: int
    host_pages: int
    chunk_pages: int
    chunks: int
    step_pages: int
    new_chunks: int
    group: int
    device_bytes: int
    host_bytes: int

    @property
    def pages(self) -> int:
        """Of both spaces."""
        return self.device_slots + self.host_pages


def plan_spaces(
    config: SwapConfig,
    share: float,
    *,
    kv_device_bytes: int,
    layers: int,
    page_bytes: int,
    step_pages: int,
    sequences: int,
    group: int = 1,
) -> SpacePlan:
    """Divides `kv_device_bytes` so that a full cache has the share phi on the host.

    Args:
      page_bytes: of one page in one layer.
      step_pages: new pages that one step may write.
      sequences: running at once: each has a page that is not full.
      group: layers that are launched together.

    Raises:
      UserError: not even the pages that one step writes would fit, with the smallest budget that works; or the host's
        bytes do not hold the share.
    """
    d = config.staging_segments
    # Cannot leave: each sequence's last page; what a step writes, has just written for one that ended, or computed
    # although another was first, until it has settled.
    least = sequences + 3 * step_pages

    def planned(slots: int) -> SpacePlan:
        host = int(share / (1 - share) * slots)
        chunk = min(config.chunk_pages, max(1, host // 8)) if host else 1
        chunks = -(-host // chunk)
        written = step_pages + sequences
        new = -(-written // chunk) + 1 if host else 0
        device = page_bytes * (layers * (slots + 1) + d * group * (chunks + new) * chunk)
        return SpacePlan(
            slots, host, chunk, chunks, written, new, group, device, layers * page_bytes * chunk * (chunks + new)
        )

    smallest = planned(least)
    if smallest.device_bytes > kv_device_bytes:
        together, lower = (f" of {group} layers", ", layers_per_program") if group > 1 else ("", "")
        raise UserError(
            f"swapping: found {kv_device_bytes} bytes of the device for keys and values, expected at least "
            f"{smallest.device_bytes}: {least} pages of {layers} layers for {sequences} sequences and a step's "
            f"{step_pages} new pages, and {d} segments of {smallest.chunks + smallest.new_chunks} chunks{together}; "
            f"lower max_sequences, max_batch_tokens{lower} or the host's share"
        )
    low, high = least, kv_device_bytes // (layers * page_bytes)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if planned(middle).device_bytes <= kv_device_bytes else (low, middle - 1)
    found = planned(low)
    if found.host_bytes > config.host_bytes:
        raise UserError(
            f"host_bytes: found {config.host_bytes}, expected at least {found.host_bytes} for a share of {share:.3f} "
            "on the host; lower host_share"
        )
    return found


def largest_share(
    config: SwapConfig,
    wanted: float,
    *,
    kv_device_bytes: int,
    layers: int,
    page_bytes: int,
    step_pages: int,
    sequences: int,
    group: int = 1,
) -> float:
    """The largest share, at most `wanted` and in steps of `config.step`, that the host's bytes hold."""
    share = wanted
    while share > 0:
        try:
            plan_spaces(
                config,
                share,
                kv_device_bytes=kv_device_bytes,
                layers=layers,
                page_bytes=page_bytes,
                step_pages=step_pages,
                sequences=sequences,
                group=group,
            )
        except UserError:
            share = max(0.0, share - config.step)
        else:
            return share
    return 0.0
