"""What is trained on: random examples whose lengths vary as conversations' do, in steps of equally many."""

import dataclasses

import numpy as np

Example = tuple[list[int], list[int]]
"""Token ids, and 1 where a token is a target."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """Attributes:
    steps: different steps; a longer run begins again.
    examples: of a step.
    seq_len: tokens of the longest example, and of a packed row.
    mean_tokens: of an example, log-normal.
    prompt_share: of its tokens are no targets.
    """

    steps: int = 12
    examples: int = 16
    seq_len: int = 512
    mean_tokens: int = 120
    prompt_share: float = 0.3
    vocab_size: int = 37_984
    seed: int = 0

    def draw(self) -> list[list[Example]]:
        """The steps."""
        rng = np.random.default_rng(self.seed)
        spread = 0.6
        lengths = rng.lognormal(np.log(self.mean_tokens) - spread**2 / 2, spread, (self.steps, self.examples))
        found = []
        for row in np.clip(np.round(lengths), 8, self.seq_len).astype(int).tolist():
            step = []
            for length in row:
                prompt = max(1, round(self.prompt_share * length))
                ids = rng.integers(self.vocab_size, size=length).tolist()
                step.append((ids, [0] * prompt + [1] * (length - prompt)))
            found.append(step)
        return found


def targets_of(step: list[Example]) -> int:
    """Trained tokens: the first token of an example has nothing before it."""
    return sum(sum(mask[1:]) for _, mask in step)
