"""Whether a backend gives a token's logits the same bits in every step: alone or in a crowd, whatever the chunks.

Run at start-up by engines with `batch_invariant`. It runs the compiled steps themselves on a probe, in every shape, and
compares bits; nothing is compiled, and only pages that nobody holds yet are written.
"""

import numpy as np
from jaxtyping import Float32

from jaxstack.engine.batch import BatchShape, pack
from jaxstack.engine.request import Request, SamplingParams, Sequence
from jaxstack.engine.runner import Runner
from jaxstack.engine.scheduler import Row, StepPlan
from jaxstack.runtime.errors import UserError

# The probe's tokens. Its pages are the first of the cache, and the crowd around it reads them, too.
_LENGTH = 21


def differing_shapes(runner: Runner, *, page_size: int, num_pages: int) -> list[str]:
    """The steps in which a probe got other bits than in the first; empty if the backend keeps its word."""
    probe = _Probe(runner, page_size, num_pages)
    chunks = [shape for shape in runner.shapes if not shape.decode]
    found: list[str] = []
    truth = probe.alone(chunks[0], 0, _LENGTH)  # logits after the probe's last token
    for shape in chunks:
        for name, ends in (("", (_LENGTH,)), (" in pieces", (4, 5, 13, _LENGTH - 1, _LENGTH)), (" in a crowd", None)):
            logits = probe.crowded(shape, 0, _LENGTH) if ends is None else probe.in_pieces(shape, ends)
            if not np.array_equal(logits, truth):
                found.append(f"{shape.rows} tokens{name}")
    for shape in runner.shapes:
        for name in ("alone", "in a crowd"):
            decoded = probe.alone if name == "alone" else probe.crowded
            if not np.array_equal(decoded(shape, _LENGTH - 1, 1), truth):
                found.append(f"one token {name} in a step of {shape.rows}")
    return found


class _Probe:
    def __init__(self, runner: Runner, page_size: int, num_pages: int):
        self._runner, self._page_size, self._num_pages = runner, page_size, num_pages
        rng = np.random.default_rng(0)
        self._vocab = runner.config.vocab_size
        self._tokens = rng.integers(0, self._vocab, _LENGTH).tolist()

    def alone(self, shape: BatchShape, start: int, count: int) -> Float32[np.ndarray, " vocab"]:
        return self._run(shape, [self._row(self._tokens, start, count)])

    def in_pieces(self, shape: BatchShape, ends: tuple[int, ...]) -> Float32[np.ndarray, " vocab"]:
        for start, end in zip((0, *ends), ends):
            logits = self.alone(shape, start, end - start)
        return logits

    def crowded(self, shape: BatchShape, start: int, count: int) -> Float32[np.ndarray, " vocab"]:
        """With as many others as fit: of other tokens and lengths, on the probe's pages, which they never write."""
        rng = np.random.default_rng(1)
        rows: list[Row] = []
        room = shape.rows - count
        while room > 0 and len(rows) < shape.sequences - 1:
            length = 1 if shape.decode else int(rng.integers(1, min(room, _LENGTH) + 1))
            at = int(rng.integers(0, _LENGTH - length + 1))
            rows.append(self._row(rng.integers(0, self._vocab, _LENGTH).tolist(), at, length, written=False))
            room -= length
        singles = [row for row in rows if row.count == 1]
        own = self._row(self._tokens, start, count)
        many = [row for row in rows if row.count > 1]
        return self._run(shape, [*singles, own, *many] if count == 1 else [*singles, *many, own])

    def _row(self, tokens: list[int], start: int, count: int, *, written: bool = True) -> Row:
        request = Request("probe", tuple(tokens), SamplingParams(), 0.0, 0, 1, 0)
        pages = list(range(-(-_LENGTH // self._page_size)))
        shared = 0 if written else len(pages)
        return Row(Sequence(request, 0, tokens, pages=pages, shared_pages=shared), start, count, True)

    def _run(self, shape: BatchShape, rows: list[Row]) -> Float32[np.ndarray, " vocab"]:
        """Logits of the row that is written."""
        plan = StepPlan(rows, sum(row.count == 1 for row in rows))
        batch = pack(plan, (shape,), page_size=self._page_size, num_pages=self._num_pages)
        which = next(i for i, row in enumerate(rows) if not row.sequence.shared_pages)
        return np.asarray(self._runner.launch(batch).logits)[which]


def prove(runner: Runner, *, page_size: int, num_pages: int) -> None:
    """Raises UserError if this backend gives one token other bits in another step."""
    differing = differing_shapes(runner, page_size=page_size, num_pages=num_pages)
    if differing:
        raise UserError(
            f"batch_invariant: found other bits for {len(differing)} ways to compute one token ({differing[0]}"
            f"{', ...' if len(differing) > 1 else ''}), expected the same; this backend cannot, set it to False"
        )
