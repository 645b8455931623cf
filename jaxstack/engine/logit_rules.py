"""What a request asks of its logits before the temperature: bias, allowed tokens, grammar, no end yet, penalties.

What a rule needs beyond a few numbers a row (1,024 biases, sets of tokens, the tokens so far) lives on the device, one
record a slot, written when a sequence with such rules takes the slot. Plain requests never touch it: their rows carry
neutral numbers, and whatever an earlier sequence left in the slot is not read. Tokens drawn are noted there by the step
that draws them, so penalties never wait for the host.

Sets of tokens are bits: token t is bit t % 32 of word t // 32, words in int32.
"""

import dataclasses
import functools
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt

from jaxstack.engine.request import MAX_LOGIT_BIAS, SamplingParams

# Bits of `RowParams.flags`.
RESTRICTED = 1  # the slot's allowed tokens count
ENDS_BARRED = 2  # the slot's end tokens are out
GUIDED = 4  # the row of the grammar mask counts
PROCESSED = 8  # logprobs of the distribution that the token was drawn from

# Entries of a list looked at in one round of a loop that ends with the longest list in use.
_ROUND = 128
# A token of the prompt counts this much, one of the answer 1: one number tells both apart.
_IN_PROMPT = 1 << 24


class RowParams(NamedTuple):
    """One entry per row, and one flag for all. `top_k` 0 keeps all. `seed` is 64 bits in two words.

    `choice` and `position` (tokens of the answer before this one) count from 0. `slot` is where the row's record is;
    rows that mean nothing use the last one. `biases` is how many entries of the record's bias list count.
    """

    temperature: Float[Array, " rows"]
    top_p: Float[Array, " rows"]
    min_p: Float[Array, " rows"]
    repetition: Float[Array, " rows"]
    frequency: Float[Array, " rows"]
    presence: Float[Array, " rows"]
    top_k: Int[Array, " rows"]
    seed: UInt[Array, "rows 2"]
    choice: Int[Array, " rows"]
    position: Int[Array, " rows"]
    slot: Int[Array, " rows"]
    prompt_length: Int[Array, " rows"]
    biases: Int[Array, " rows"]
    flags: Int[Array, " rows"]
    wants_logprobs: Int[Array, ""]


class SlotState(NamedTuple):
    """The records. One slot more than sequences: the last belongs to rows that mean nothing."""

    tokens: Int[Array, "slots length"]
    bias_ids: Int[Array, "slots entries"]
    bias_values: Float[Array, "slots entries"]
    allowed: Int[Array, "slots words"]
    ends: Int[Array, "slots words"]


def words(vocab: int) -> int:
    """int32 words that hold one bit for each token."""
    return -(-vocab // 32)


def bits(ids: Iterable[int], vocab: int) -> Int32[np.ndarray, " words"]:
    """The set `ids` as bits."""
    flags = np.zeros(words(vocab) * 32, bool)
    flags[list(ids)] = True
    return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """What one slot's record holds: for sequences of at most `length` tokens over `vocab` columns of logits."""

    length: int
    vocab: int

    @property
    def fields(self) -> dict[str, int]:
        """Elements of each part, in the order of `SlotState`."""
        length = -(-self.length // _ROUND) * _ROUND
        entries = {"bias_ids": MAX_LOGIT_BIAS, "bias_values": MAX_LOGIT_BIAS}
        return {"tokens": length, **entries, "allowed": words(self.vocab), "ends": words(self.vocab)}

    @property
    def size(self) -> int:
        return sum(self.fields.values())

    @property
    def parts(self) -> list[tuple[int, jnp.dtype]]:
        """Elements and dtype of each part."""
        dtype = {"bias_values": jnp.float32}
        return [(n, jnp.dtype(dtype.get(name, jnp.int32))) for name, n in self.fields.items()]

    def new_state(self, slots: int) -> SlotState:
        """Empty records, one more than `slots`."""
        return SlotState(*(jnp.zeros((slots + 1, n), dtype) for n, dtype in self.parts))

    def pack(self, sampling: SamplingParams, tokens: Seq[int], ends: Iterable[int]) -> Int32[np.ndarray, " size"]:
        """One record as a flat host array, for `write_record`.

        Args:
          tokens: prompt and answer so far.
          ends: token ids that end the answer.
        """
        flat = np.zeros(self.size, np.int32)
        bounds = np.cumsum([*self.fields.values()])[:-1]
        history, ids, values, allowed, barred = np.split(flat, bounds)
        history[: len(tokens)] = tokens
        if sampling.biases:
            given = np.asarray(sampling.biases, np.float64)
            ids[: len(given)] = given[:, 0]
            values[: len(given)] = given[:, 1].astype(np.float32).view(np.int32)
        if sampling.allowed_token_ids is not None:
            allowed[:] = bits(sampling.allowed_token_ids, self.vocab)
        if sampling.min_tokens:
            barred[:] = bits((t for t in ends if t < self.vocab), self.vocab)
        return flat


def needs_record(sampling: SamplingParams) -> bool:
    """Whether a sequence with these parameters must be written into its slot before its first draw there."""
    return bool(sampling.penalised or sampling.biases or sampling.allowed_token_ids or sampling.min_tokens)


def write_record(state: SlotState, slot: Int[Array, ""], flat: Int[Array, " n"]) -> SlotState:
    """`state` with the record of `slot` replaced."""
    at, written = 0, []
    for part in state:
        row = flat[at : at + part.shape[1]]
        at += part.shape[1]
        if part.dtype == jnp.float32:
            row = jax.lax.bitcast_convert_type(row, jnp.float32)
        written.append(part.at[slot].set(row, mode="promise_in_bounds"))
    return SlotState(*written)


def note_drawn(state: SlotState, params: RowParams, token: Int[Array, " rows"]) -> SlotState:
    """`state` with the drawn tokens at their places in the slots' lists."""
    place = params.prompt_length + params.position
    return state._replace(tokens=state.tokens.at[params.slot, place].set(token, mode="drop"))


def penalised(params: RowParams) -> Bool[Array, " rows"]:
    return (params.repetition != 1.0) | (params.frequency != 0.0) | (params.presence != 0.0)


def touched(params: RowParams) -> Bool[Array, " rows"]:
    """Rows whose logits a rule may change."""
    masked = (params.flags & (RESTRICTED | ENDS_BARRED | GUIDED)) != 0
    return masked | (params.biases > 0) | penalised(params)


def apply_rules(
    logits: Float[Array, "rows vocab"],
    params: RowParams,
    state: SlotState,
    grammar: Int[Array, "rows words"],
) -> Float[Array, "rows vocab"]:
    """The logits after bias, masks and penalties, in this order; -inf where a token may not come.

    A row without rules comes back bit for bit. End tokens are not barred where nothing else is left to draw.

    Args:
      grammar: bits of the tokens that each guided row's grammar allows next; other rows' bits are not read.
    """
    allowed = _allowed_bits(params, state, grammar, logits.shape[1])
    # Masks before bias: the result is the same, and the loop that adds biases gets an array of its own to work in.
    # Given the logits themselves, XLA would copy them in every step, also where no row has a rule.
    changed = jnp.where(_unpacked(allowed, logits.shape[1]), logits, -jnp.inf)
    changed = _biased(changed, params, state)
    any_penalty = penalised(params).any()
    return jax.lax.cond(any_penalty, functools.partial(_penalise, params=params, state=state), lambda x: x, changed)


def _biased(logits, params, state):
    rows, vocab = logits.shape
    ids, values = state.bias_ids[params.slot], state.bias_values[params.slot]

    def add(i, logits):
        part = jax.lax.dynamic_slice_in_dim(ids, i * _ROUND, _ROUND, axis=1)
        inside = i * _ROUND + jnp.arange(_ROUND) < params.biases[:, None]
        part = jnp.where(inside, part, vocab)
        value = jax.lax.dynamic_slice_in_dim(values, i * _ROUND, _ROUND, axis=1)
        return logits.at[jnp.arange(rows)[:, None], part].add(value, mode="drop")

    return jax.lax.fori_loop(0, -(-params.biases.max() // _ROUND), add, logits)


def _allowed_bits(params, state, grammar, vocab):
    """One word-wise AND of all sets, before any of them is spread over the vocabulary."""
    has = lambda flag: ((params.flags & flag) != 0)[:, None]  # noqa: E731
    allowed = jnp.where(has(GUIDED), grammar, -1)
    allowed &= jnp.where(has(RESTRICTED), state.allowed[params.slot], -1)
    without_ends = allowed & jnp.where(has(ENDS_BARRED), ~state.ends[params.slot], -1)
    inside = jnp.asarray(bits(range(vocab), vocab))
    return jnp.where(((without_ends & inside) != 0).any(-1, keepdims=True), without_ends, allowed)


def _unpacked(words_, vocab):
    """Bits to one flag a token."""
    spread = (words_[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return spread.reshape(words_.shape[0], -1)[:, :vocab] != 0


def _penalise(logits, *, params, state):
    """Repetition over prompt and answer, then frequency and presence over the answer alone."""
    rows, vocab = logits.shape
    active = penalised(params)
    history = state.tokens[params.slot]
    begin = jnp.where(active, params.prompt_length, 0)
    end = jnp.where(active, params.prompt_length + params.position, 0)
    row = jnp.arange(rows)[:, None]

    def part(i, low, high):
        place = i * _ROUND + jnp.arange(_ROUND)
        tokens = jax.lax.dynamic_slice_in_dim(history, i * _ROUND, _ROUND, axis=1)
        return jnp.where((place >= low[:, None]) & (place < high[:, None]), tokens, vocab)

    def of_prompt(i, counts):
        return counts.at[row, part(i, jnp.zeros_like(begin), begin)].set(_IN_PROMPT, mode="drop")

    def of_answer(i, counts):
        return counts.at[row, part(i, begin, end)].add(1, mode="drop")

    counts = jnp.zeros((rows, vocab), jnp.int32)
    # Prompts only matter to repetition.
    prompt_end = jnp.where(params.repetition != 1.0, begin, 0).max()
    counts = jax.lax.fori_loop(0, -(-prompt_end // _ROUND), of_prompt, counts)
    first = jnp.where(active, begin, jnp.iinfo(jnp.int32).max).min()
    counts = jax.lax.fori_loop(first // _ROUND, -(-end.max() // _ROUND), of_answer, counts)

    repetition, frequency, presence = (p[:, None] for p in (params.repetition, params.frequency, params.presence))
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, repeated, logits)
    drawn = counts & (_IN_PROMPT - 1)
    return logits - (frequency * drawn + jnp.where(drawn > 0, presence, 0.0))
