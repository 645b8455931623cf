"""What the sampler is told of each row of a step, as two flat host arrays.

Packed after the step before has settled and while this step's forward pass runs, so every token that a row follows is
in `Sequence.tokens`: a grammar mask or a penalty may look at all of them, and costs no time of the device. A row whose
sequence has finished meanwhile is drawn like any other; nobody reads its token.

A new input is a new field here (a value that is neutral where a row does not use it) and in `logit_rules.RowParams`.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float32, Int32

from jaxstack.engine.batch import cut, size
from jaxstack.engine.guided import MaskFiller
from jaxstack.engine.logit_rules import ENDS_BARRED, GUIDED, PROCESSED, RESTRICTED, RecordLayout, needs_record, words
from jaxstack.engine.request import Sequence
from jaxstack.engine.sampling import GREEDY, Kind
from jaxstack.engine.scheduler import Row, StepPlan


def int_fields(samples: int) -> dict[str, tuple[int, ...]]:
    """The sampler's int32 fields. `slot` also says where a drawn token is kept for the next forward pass."""
    names = ("top_k", "choice", "position", "slot", "prompt_length", "biases", "flags")
    return {"seed": (samples, 2), **dict.fromkeys(names, (samples,)), "wants_logprobs": ()}


def float_fields(samples: int) -> dict[str, tuple[int, ...]]:
    """The sampler's float32 fields."""
    names = ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")
    return dict.fromkeys(names, (samples,))


@dataclasses.dataclass(frozen=True)
class HostDraws:
    """What one run of the sampler is launched with. Row i belongs to `plan.rows[i]`.

    `records` are written into their slots before. `grammar` is None where no row is guided.
    """

    ints: Int32[np.ndarray, " n_ints"]
    floats: Float32[np.ndarray, " n_floats"]
    records: tuple[tuple[int, Int32[np.ndarray, " n_record"]], ...] = ()
    grammar: Int32[np.ndarray, "samples words"] | None = None
    kind: Kind = "greedy"


def no_draws(samples: int, scrap_slot: int) -> HostDraws:
    """Rows that mean nothing: greedy, without a rule, and kept in `scrap_slot`."""
    ints, floats = np.zeros(size(int_fields(samples)), np.int32), np.zeros(size(float_fields(samples)), np.float32)
    cut(ints, int_fields(samples))["slot"][:] = scrap_slot
    g = cut(floats, float_fields(samples))
    g["top_p"][:] = 1.0
    g["repetition"][:] = 1.0
    return HostDraws(ints, floats)


class DrawPacker:
    """Packs step after step; remembers which sequence's record each slot holds.

    Args:
      scrap_slot: keeps what rows that draw nothing leave.
      layout: of the records.
      eos: the token ids that end an answer, unless a request says otherwise.
    """

    def __init__(self, *, scrap_slot: int, layout: RecordLayout, eos: Iterable[int]):
        self._scrap_slot, self._layout, self._eos = scrap_slot, layout, tuple(eos)
        self._filler = MaskFiller()
        self._holders: list[Sequence | None] = [None] * scrap_slot

    def pack(self, plan: StepPlan, samples: int) -> HostDraws:
        """Fills the arrays for `samples` rows."""
        draws = no_draws(samples, self._scrap_slot)
        h, g = cut(draws.ints, int_fields(samples)), cut(draws.floats, float_fields(samples))
        records: list[tuple[int, Int32[np.ndarray, " n_record"]]] = []
        guided: list[tuple[int, Sequence]] = []
        kind: Kind = "greedy"
        for i, row in enumerate(plan.rows):
            if not row.samples:
                continue
            sequence, request, sampling = row.sequence, row.sequence.request, row.sequence.request.sampling
            h["slot"][i] = sequence.slot
            h["prompt_length"][i] = len(request.prompt)
            h["top_k"][i] = sampling.top_k
            h["seed"][i] = np.array([request.seed >> 32, request.seed & 0xFFFFFFFF], np.uint32).view(np.int32)
            h["choice"][i] = sequence.index
            h["position"][i] = row.start + row.count - len(request.prompt)
            g["temperature"][i] = sampling.temperature
            g["top_p"][i] = sampling.top_p
            g["min_p"][i] = sampling.min_p
            if request.logprobs is not None:
                h["wants_logprobs"][...] = 1
            if request.logprobs is not None or sampling.ruled:
                kind = "any"
            elif sampling.temperature >= GREEDY and kind == "greedy":
                kind = "plain"
            known = self._holders[sequence.slot] is sequence
            self._holders[sequence.slot] = sequence
            if sampling.ruled and sequence.finish_reason is None:
                self._rules(i, row, h, g)
                if not known and needs_record(sampling):
                    records.append((sequence.slot, self._record(sequence)))
                if sequence.matcher is not None:
                    guided.append((i, sequence))
        grammar = None
        if guided:
            grammar = np.zeros((samples, words(self._layout.vocab)), np.int32)
            self._filler.fill(grammar, [(sequence.matcher, i) for i, sequence in guided])
        return dataclasses.replace(draws, records=tuple(records), grammar=grammar, kind=kind)

    def forget(self) -> None:
        """The records on the device are lost."""
        self._holders = [None] * self._scrap_slot

    def _rules(self, i: int, row: Row, h: dict, g: dict) -> None:
        sampling = row.sequence.request.sampling
        g["repetition"][i] = sampling.repetition_penalty
        g["frequency"][i] = sampling.frequency_penalty
        g["presence"][i] = sampling.presence_penalty
        h["biases"][i] = len(sampling.biases)
        h["flags"][i] = (
            (RESTRICTED if sampling.allowed_token_ids is not None else 0)
            | (ENDS_BARRED if h["position"][i] < sampling.min_tokens else 0)
            | (GUIDED if row.sequence.matcher is not None else 0)
            | (PROCESSED if sampling.logprobs_mode == "processed" else 0)
        )

    def _record(self, sequence: Sequence) -> Int32[np.ndarray, " n_record"]:
        sampling = sequence.request.sampling
        ends = sampling.stop_token_ids if sampling.ignore_eos else (*self._eos, *sampling.stop_token_ids)
        return self._layout.pack(sampling, sequence.tokens, ends)
