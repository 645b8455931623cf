"""What is trained on: random examples whose lengths vary as conversations' do, packed into rows."""

import dataclasses

import numpy as np

from jaxstack.training.data import DataReport, TokenizedDataset
from jaxstack.training.packing import HostBatch, PackedBatches, Place, fill_rows

Example = tuple[list[int], list[int]]
"""Token ids, and 1 where a token is a target."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attributes:
    steps: of a run.
    rows: of a step, packed by the trainer's own packer.
    seq_len: tokens of a row, and of the longest example.
    mean_tokens: of an example, log-normal.
    prompt_share: of its tokens are no targets.
    """

    steps: int = 13
    rows: int = 4
    seq_len: int = 512
    mean_tokens: int = 120
    prompt_share: float = 0.3
    vocab_size: int = 37_984
    seed: int = 0

    def draw(self) -> "Steps":
        rng = np.random.default_rng(self.seed)
        spread = 0.6
        # More than are needed: the last rows of a packed set are those that did not come out even.
        count = 100 + 3 * self.steps * self.rows * self.seq_len // self.mean_tokens
        drawn = rng.lognormal(np.log(self.mean_tokens) - spread**2 / 2, spread, count)
        lengths = np.clip(np.round(drawn), 8, self.seq_len).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        mask = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) >= np.repeat(
            np.maximum(1, np.round(self.prompt_share * lengths)), lengths
        )
        ids = rng.integers(self.vocab_size, size=offsets[-1], dtype=np.int32)
        dataset = TokenizedDataset(ids, mask, offsets, DataReport())
        packed = PackedBatches(dataset, row_count=self.rows, row_length=self.seq_len, seed=self.seed)
        return Steps(packed, self.steps)


class Steps:
    """The steps of a run: for either side the same examples.

    Attributes:
      dataset: all examples there are.
      examples: of each step, as indices of the data set.
    """

    def __init__(self, packed: PackedBatches, count: int):
        self._packed, self.dataset = packed, packed.dataset
        rows, at_once = packed.rows(0), packed.row_count
        assert len(rows) >= count * at_once
        self.examples = [
            [index for row in rows[i * at_once : (i + 1) * at_once] for index in row] for i in range(count)
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest example in any step."""
        return max(int(self.dataset.lengths[step].max()) for step in self.examples)

    @property
    def fill_rate(self) -> float:
        """The part of the packed rows that holds tokens."""
        tokens = sum(int(self.dataset.lengths[step].sum()) for step in self.examples)
        return tokens / (len(self.examples) * self._packed.row_count * self._packed.row_length)

    def packed(self) -> list[HostBatch]:
        """The steps as the trainer packs them."""
        return [self._packed.batch(Place(0, number)) for number in range(len(self.examples))]

    def padded(self, count: int) -> list[HostBatch]:
        """The first `count` examples of each step, each in a row of its own, rows as long as the longest of all."""
        length = max(int(self.dataset.lengths[step[:count]].max()) for step in self.examples)
        return [fill_rows(self.dataset, [[i] for i in step[:count]], count, length) for step in self.examples]

    def plain(self, count: int | None = None) -> list[list[Example]]:
        """Every step's examples (or its first `count`) as lists, for the other side."""
        data = self.dataset

        def example(index: int) -> Example:
            here = slice(data.offsets[index], data.offsets[index + 1])
            return data.token_ids[here].tolist(), data.loss_mask[here].astype(int).tolist()

        return [[example(index) for index in step[:count]] for step in self.examples]


def targets_of(batch: HostBatch) -> int:
    """Trained tokens: the first token of an example has nothing before it."""
    return int((batch["loss_mask"] * (batch["positions"] > 0)).sum())
