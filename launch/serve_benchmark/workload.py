"""The requests of the serving benchmark: random token ids, lengths drawn once, contents fresh for every run."""

import dataclasses

import numpy as np

from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Requests:
    """What one run answers. Request i has prompt `prompts[i]` and gets exactly `max_tokens[i]` tokens."""

    prompts: list[list[int]]
    max_tokens: list[int]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.max_tokens)


@dataclasses.dataclass(frozen=True)
class Workload:
    """`requests` requests at once; prompt and answer lengths uniform between two bounds, both included.

    Args:
      requests: how many.
      prompt_tokens: bounds of the prompt's length; with a shared prefix every prompt has the upper one.
      output_tokens: bounds of the answer's length.
      vocab_size: token ids are drawn below it.
      shared_prefix: share of each prompt, from its beginning, that all prompts of a run have in common.
      seed: of lengths and contents.

    Raises:
      UserError: a number out of range.
    """

    requests: int = 32
    prompt_tokens: tuple[int, int] = (32, 256)
    output_tokens: tuple[int, int] = (16, 96)
    vocab_size: int = 151_936
    shared_prefix: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 1:
            raise UserError(f"requests: found {self.requests}, expected at least 1")
        for name in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise UserError(f"{name}: found {low} to {high}, expected 1 <= lowest <= highest")
        if not 0 <= self.shared_prefix < 1:
            raise UserError(f"shared_prefix: found {self.shared_prefix}, expected a share from 0 to below 1")
        if self.vocab_size < 2:
            raise UserError(f"vocab_size: found {self.vocab_size}, expected at least 2")

    @property
    def window(self) -> int:
        """The longest prompt and the longest answer together, in tokens."""
        return self.prompt_tokens[1] + self.output_tokens[1]

    @property
    def shared_tokens(self) -> int:
        return int(self.shared_prefix * self.prompt_tokens[1])

    def draw(self, variant: int) -> Requests:
        """Variant `variant` of the requests: the lengths of every other, and token ids of its own.

        No run meets the prompts of an earlier one, so a prefix cache left on from run to run holds nothing that helps.
        """
        lengths = np.random.default_rng((self.seed, 0))
        prompt_low, prompt_high = self.prompt_tokens
        sizes = lengths.integers(prompt_low, prompt_high, size=self.requests, endpoint=True)
        outputs = lengths.integers(*self.output_tokens, size=self.requests, endpoint=True)
        if self.shared_prefix:
            sizes[:] = prompt_high
        contents = np.random.default_rng((self.seed, 1 + variant))
        shared = contents.integers(self.vocab_size, size=self.shared_tokens).tolist()
        own = [contents.integers(self.vocab_size, size=size - len(shared)).tolist() for size in sizes]
        return Requests([shared + tokens for tokens in own], outputs.tolist())
