"""What the cache says to a request."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float

from jaxstack.serving.semantic_cache.entry import CachedResponse
from jaxstack.serving.semantic_cache.scope import CacheRequest

Kind = Literal["exact", "hit", "coalesced", "explore", "miss", "bypass"]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What the cache says to a request.

    Attributes:
      kind: "exact" (this very request was answered before), "hit" (a near one was, and that is taken to be right),
        "explore" (a near one was, but the model shall answer), "miss", "bypass" (the cache has no part in it).
        "coalesced" only from `answer`: another equal request is being answered.
      reason: why, in a word or two.
      response: the answer, of "exact" and "hit" out of shadow mode; else None: ask the model, then `complete`.
      entry_id: that answers, or would have.
      age_s: of the answer.
    """

    request: CacheRequest
    kind: Kind
    reason: str
    number: int = 0
    response: CachedResponse | None = None
    entry_id: int | None = None
    similarity: float | None = None
    alpha: float | None = None
    tau: float | None = None
    u: float | None = None
    age_s: float = 0.0
    vector: Float[np.ndarray, "dim"] | None = dataclasses.field(default=None, repr=False, compare=False)
    candidate: CachedResponse | None = dataclasses.field(default=None, repr=False)
    epoch: int = 0
