"""What a step of a replica takes."""

import dataclasses

import numpy as np
import scipy.optimize

from jaxstack.fleet.profile.roofline import Roofline
from jaxstack.fleet.profile.throughput import ThroughputProfile
from jaxstack.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """A step that decodes B requests with C tokens of context, and computes n tokens of prompts beside them, takes

        max(token_s (B + n), weights_s + context_token_s C) + prompt_token_s n + overhead_s

    which is the roofline of one batch of both: prompts are computed while the decoding waits for memory.

    Args:
      token_s: of computing, where that can hide behind reading.
      prompt_token_s: of a prompt's token, what cannot.
      kv_tokens: of cache; a request is taken in when there is room for all that it will ever have.
      max_batch: requests taken in.
    """

    token_s: float
    weights_s: float
    context_token_s: float
    prompt_token_s: float
    overhead_s: float
    kv_tokens: int
    max_batch: int = 256

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise UserError(f"step times: {field.name}: found {getattr(self, field.name)}, expected >= 0")
        if not self.weights_s + self.overhead_s > 0:
            raise UserError("step times: found steps that take no time, expected overhead_s or weights_s above 0")

    def seconds(self, batch: int, context_tokens: int, prompt_tokens: int) -> float:
        compute = self.token_s * (batch + prompt_tokens)
        reading = self.weights_s + self.context_token_s * context_tokens
        return max(compute, reading) + self.prompt_token_s * prompt_tokens + self.overhead_s

    @classmethod
    def of_roofline(cls, roofline: Roofline) -> "StepTimes":
        """The law of `profile/roofline.py`."""
        return cls(
            roofline.s_per_token,
            roofline.read_weights_s,
            roofline.read_token_s,
            0.0,
            roofline.overhead_s,
            roofline.kv_tokens,
            roofline.max_batch,
        )

    @classmethod
    def fit(cls, profile: ThroughputProfile, name: str) -> "StepTimes":
        """The step times that explain a measured profile best: at the highest rate T of a bucket, C requests are under
        way and a step takes C / (output T). Least squares of relative errors, over the buckets that can be served.

        Raises:
          UserError: the profile has no concurrency, or the type can serve nothing.
        """
        if profile.concurrency is None:
            raise UserError("step times: found a profile without concurrency, expected it")
        rate, under_way = profile.max_rate_rps[name], profile.concurrency[name]
        able = (rate > 0) & (under_way > 0)
        if not able.any():
            raise UserError(f"step times: {name} can serve nothing, expected a bucket with a rate")
        read, written = (lengths[able] for lengths in profile.grid.upper_corners())
        batch = under_way[able]
        step = batch / (written * rate[able])
        causes = np.stack([np.ones(len(step)), batch * (read + written / 2), batch / written * read], axis=1)
        # A request is answered with at least one step of its own.
        (fixed, context, prompt), _ = scipy.optimize.nnls(causes / step[:, None], np.ones(len(step)))
        fixed = max(fixed, 1e-6)
        room = int(np.ceil((batch * (read + written)).max()))
        return cls(0.0, 0.0, context, prompt, fixed, max(room, int((read + written).max())), int(np.ceil(batch.max())))
