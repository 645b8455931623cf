"""What a cache holds: an answer that a model gave, and how it has been used."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CachedResponse:
    """An answer.

    Attributes:
      text: as the model wrote it.
      finish_reason: only answers that ended with "stop" are kept.
      prompt_tokens, completion_tokens: that it took.
      generation_s: seconds that it took, which a hit saves.
      stop_reason: the string or token that ended it; None for the end of the text.
    """

    text: str
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    generation_s: float = 0.0
    stop_reason: int | str | None = None


@dataclasses.dataclass
class Entry:
    """One cached answer. Only the cache that holds it changes it, under its lock.

    Attributes:
      owner, scope: where it lives; nothing outside is ever answered with it.
      exact: digest of the request that it answers exactly.
      semantic: whether near requests may be answered with it, too.
      reports: distinct complaints about it.
    """

    id: int
    owner: str
    scope: bytes
    exact: bytes
    model: str
    prompt: str
    response: CachedResponse
    semantic: bool
    created_s: float
    expires_s: float | None
    last_used_s: float
    hits: int = 0
    saved_s: float = 0.0
    size_bytes: int = 0
    reports: int = 0

    def good_at(self, now_s: float) -> bool:
        return self.expires_s is None or now_s < self.expires_s
