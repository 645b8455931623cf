"""What the sampler is told of each row of a step, as two flat host arrays.

Packed after the step before has settled and while this step's forward pass runs, so every token that a row follows is
in `Sequence.tokens`: a grammar mask or a penalty may look at all of them, and costs no time of the device. A row whose
sequence has finished meanwhile is drawn like any other; nobody reads its token.

A new input is a new field here (a value that is neutral where a row does not use it) and in `sampling.RowParams`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32

from jaxstack.engine.batch import cut, size
from jaxstack.engine.scheduler import StepPlan


def int_fields(samples: int) -> dict[str, tuple[int, ...]]:
    """The sampler's int32 fields. `slots` says where a drawn token is kept for the next forward pass."""
    return {
        "slots": (samples,),
        "top_k": (samples,),
        "seed": (samples, 2),
        "choice": (samples,),
        "position": (samples,),
        "wants_logprobs": (),
    }


def float_fields(samples: int) -> dict[str, tuple[int, ...]]:
    """The sampler's float32 fields."""
    return {"temperature": (samples,), "top_p": (samples,)}


@dataclasses.dataclass(frozen=True)
class HostDraws:
    """What one run of the sampler is launched with. Row i belongs to `plan.rows[i]`."""

    ints: Int32[np.ndarray, " n_ints"]
    floats: Float32[np.ndarray, " n_floats"]


def pack_draws(plan: StepPlan, samples: int, *, scrap_slot: int) -> HostDraws:
    """Fills the arrays for `samples` rows. Rows that draw nothing keep their token in `scrap_slot`."""
    ints, floats = np.zeros(size(int_fields(samples)), np.int32), np.ones(size(float_fields(samples)), np.float32)
    h, g = cut(ints, int_fields(samples)), cut(floats, float_fields(samples))
    h["slots"][:] = scrap_slot
    g["temperature"][:] = 0.0
    for i, row in enumerate(plan.rows):
        if not row.samples:
            continue
        request, sampling = row.sequence.request, row.sequence.request.sampling
        h["slots"][i] = row.sequence.slot
        h["top_k"][i] = sampling.top_k
        h["seed"][i] = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32).view(np.int32)
        h["choice"][i] = row.sequence.index
        h["position"][i] = row.start + row.count - len(request.prompt)
        g["temperature"][i] = sampling.temperature
        g["top_p"][i] = sampling.top_p
        if request.logprobs is not None:
            h["wants_logprobs"][...] = 1
    return HostDraws(ints, floats)
