"""The sampler's compiled programs, one for each number of rows, and what it keeps on the device from step to step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxstack.engine.batch import cut, size
from jaxstack.engine.draws import HostDraws, float_fields, int_fields
from jaxstack.engine.logit_rules import RecordLayout, RowParams, SlotState, note_drawn, words, write_record
from jaxstack.engine.placement import Placement
from jaxstack.engine.sampling import Sampled, sample


class Sampler:
    """Draws the tokens of a step.

    Args:
      slots: sequences running at once. State per slot has one slot more, where rows write that mean nothing.
      length: tokens of the longest sequence.
      vocab: columns of the logits.
      placement: of device arrays.

    Attributes:
      layout: of the records that `HostDraws.records` brings.
      last_token: the token drawn last in each slot, for the next forward pass.
    """

    def __init__(self, *, slots: int, length: int, vocab: int, placement: Placement):
        self.scrap_slot, self._placement = slots, placement
        self.layout = RecordLayout(length, vocab)
        self._programs: dict[int, Callable] = {}
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

    def compile(self, rows: int, logits: Float[Array, "rows vocab"]) -> None:
        """Compiles the program for `rows` rows, unless it is there."""
        if rows in self._programs:
            return
        choices, reals, place = int_fields(rows), float_fields(rows), self._placement

        def draw(history, fixed, last_token, logits, ints, floats, grammar):
            f, g = cut(ints, choices), cut(floats, reals)
            params = RowParams(seed=jax.lax.bitcast_convert_type(f.pop("seed"), jnp.uint32), **f, **g)
            state = SlotState(history, *fixed)
            sampled = sample(logits, params, state, grammar)
            token = jnp.maximum(sampled.token, 0)
            return sampled, note_drawn(state, params, token).tokens, last_token.at[params.slot].set(token)

        ints, floats = place.struct((size(choices),), jnp.int32), place.struct((size(reals),), jnp.float32)
        grammar = place.zeros((rows, words(self.layout.vocab)), jnp.int32, place.everywhere)
        self._no_grammar[rows] = grammar
        arguments = self._history, self._fixed, self.last_token, logits, ints, floats, grammar
        self._programs[rows] = (
            jax.jit(draw, donate_argnums=(0,), out_shardings=place.everywhere).lower(*arguments).compile()
        )
        if self._write is None:
            slot, record = place.struct((), jnp.int32), place.struct((self.layout.size,), jnp.int32)
            write = jax.jit(write_record, donate_argnums=(0,), out_shardings=place.everywhere)
            self._write = write.lower(SlotState(self._history, *self._fixed), slot, record).compile()
            self._remember(self.scrap_slot, np.zeros(self.layout.size, np.int32))

    def draw(self, logits: Float[Array, "rows vocab"], draws: HostDraws) -> Sampled:
        """Starts the program and returns at once."""
        for slot, record in draws.records:
            self._remember(slot, record)
        rows = logits.shape[0]
        grammar = self._no_grammar[rows] if draws.grammar is None else draws.grammar
        sampled, self._history, self.last_token = self._programs[rows](
            self._history, self._fixed, self.last_token, logits, draws.ints, draws.floats, grammar
        )
        return sampled

    def _remember(self, slot: int, record: np.ndarray) -> None:
        assert self._write is not None
        self._history, *self._fixed = self._write(SlotState(self._history, *self._fixed), np.int32(slot), record)
