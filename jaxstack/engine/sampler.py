"""The sampler's compiled programs, one for each number of rows, and what it keeps on the device from step to step."""

import functools
from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.engine.batch import cut, size
from jaxstack.engine.draws import HostDraws, float_fields, int_fields
from jaxstack.engine.logit_rules import RecordLayout, RowParams, SlotState, note_drawn, words, write_record
from jaxstack.engine.placement import Placement
from jaxstack.engine.sampling import Kind, Sampled, sample


class Sampler:
    """Draws the tokens of a step.

    Args:
      slots: sequences running at once. State per slot has one slot more, where rows write that mean nothing.
      length: tokens of the longest sequence.
      vocab: tokens of the model.
      columns: of the logits, at least `vocab`.
      placement: of device arrays.

    Attributes:
      layout: of the records that `HostDraws.records` brings.
      columns: of the logits.
      kinds: what there are programs of their own for.
      last_token: the token drawn last in each slot, for the next forward pass.
    """

    def __init__(self, *, slots: int, length: int, vocab: int, columns: int, placement: Placement):
        self.scrap_slot, self.columns, self._placement = slots, columns, placement
        self.layout = RecordLayout(length, vocab)
        # What a step asks for is found out on the device, unless that would keep the host waiting: a GPU's branches do.
        self.kinds: tuple[Kind, ...] = get_args(Kind) if jax.default_backend() == "gpu" else ("any",)
        self._programs: dict[tuple[int, Kind], Callable] = {}
        self._write: Callable | None = None
        # Bits that no row reads, for steps without a guided row: no transfer.
        self._no_grammar: dict[int, Array] = {}
        self.reset()

    def reset(self) -> None:
        """Forgets everything kept on the device."""
        place, slots = self._placement, self.scrap_slot + 1
        zeros = functools.partial(place.zeros, sharding=place.everywhere)
        self.last_token = zeros((slots,), jnp.int32)
        self._history, *self._fixed = (zeros((slots, n), dtype) for n, dtype in self.layout.parts)

    @property
    def state_bytes(self) -> int:
        """What is kept on the device."""
        return sum(x.nbytes for x in (self.last_token, self._history, *self._fixed))

    def compile(self, rows: int) -> None:
        """Compiles the programs for `rows` rows, unless they are there."""
        if (rows, "any") in self._programs:
            return
        choices, reals, place = int_fields(rows), float_fields(rows), self._placement

        def draw(kind, history, fixed, last_token, logits, ints, floats, grammar):
            f, g = cut(ints, choices), cut(floats, reals)
            params = RowParams(seed=jax.lax.bitcast_convert_type(f.pop("seed"), jnp.uint32), **f, **g)
            state = SlotState(history, *fixed)
            sampled = sample(logits, params, state, grammar, kind)
            token = jnp.maximum(sampled.token, 0)
            return sampled, note_drawn(state, params, token).tokens, last_token.at[params.slot].set(token)

        grammar = place.zeros((rows, words(self.layout.vocab)), jnp.int32, place.everywhere)
        self._no_grammar[rows] = grammar
        arguments = (
            *self._state(),
            place.struct((self.scrap_slot + 1,), jnp.int32),
            place.struct((rows, self.columns), jnp.float32, place.logits),
            place.struct((size(choices),), jnp.int32),
            place.struct((size(reals),), jnp.float32),
            grammar,
        )
        for kind in self.kinds:
            program = jax.jit(functools.partial(draw, kind), donate_argnums=(0,), out_shardings=place.everywhere)
            self._programs[rows, kind] = program.lower(*arguments).compile()

    def compile_writer(self) -> None:
        """Compiles what writes records, unless it is there."""
        if self._write is not None:
            return
        place = self._placement
        slot, record = place.struct((), jnp.int32), place.struct((self.layout.size,), jnp.int32)
        history, fixed = self._state()
        write = jax.jit(write_record, donate_argnums=(0,), out_shardings=place.everywhere)
        self._write = write.lower(SlotState(history, *fixed), slot, record).compile()
        self._remember(self.scrap_slot, np.zeros(self.layout.size, np.int32))

    def _state(self):
        """What a program is told of the history and of the fixed records."""
        history, *fixed = (self._placement.struct((self.scrap_slot + 1, n), dtype) for n, dtype in self.layout.parts)
        return history, fixed

    def draw(self, logits: Float[Array, "rows vocab"], draws: HostDraws) -> Sampled:
        """Starts the program and returns at once."""
        for slot, record in draws.records:
            self._remember(slot, record)
        rows = logits.shape[0]
        grammar = self._no_grammar[rows] if draws.grammar is None else draws.grammar
        kind = draws.kind if draws.kind in self.kinds else "any"
        sampled, self._history, self.last_token = self._programs[rows, kind](
            self._history, self._fixed, self.last_token, logits, draws.ints, draws.floats, grammar
        )
        return sampled

    def _remember(self, slot: int, record: np.ndarray) -> None:
        assert self._write is not None
        self._history, *self._fixed = self._write(SlotState(self._history, *self._fixed), np.int32(slot), record)
