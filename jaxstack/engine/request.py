"""What goes into the engine and what comes out: sampling parameters, pieces of answers, whole answers.

Plain data, no jax. `Sequence` is the engine's own record of one choice of one request while it lives.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxstack.runtime.errors import UserError

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_LOGPROBS = 20


def _check(ok: bool, name: str, found: Any, expected: str) -> None:
    if not ok:
        raise UserError(f"{name}: found {found!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn and where they end.

    Args:
      max_tokens: tokens to generate at most; None means the rest of the window.
      temperature: 0 (anything below 1e-5) is greedy.
      top_p: nucleus mass in (0, 1]; renormalised after `top_k`.
      top_k: candidates kept; 0 means all.
      seed: with a seed a request gives the same tokens in any batch; None draws one from the engine's own generator.
      n: choices per prompt. The prompt is computed once.
      stop: strings that end an answer; the text is cut before them unless `include_stop_str_in_output`.
      stop_token_ids: token ids that end an answer, beside the model's own end tokens.
      ignore_eos: generate on past the model's end tokens.
      logprobs: alternatives reported with each token (0: the chosen one alone); None reports nothing.
      skip_special_tokens: leave special tokens out of the text.

    Raises:
      UserError: a value outside its range; the message names the field.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer >= 1")
        _check(0.0 <= self.temperature <= 1e4, "temperature", self.temperature, "a number from 0 to 10000")
        _check(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "a number in (0, 1]")
        _check(0 <= self.top_k < 2**31, "top_k", self.top_k, "an integer from 0 (keeps all) to 2**31 - 1")
        _check(self.seed is None or 0 <= self.seed < 2**63, "seed", self.seed, "an integer from 0 to 2**63 - 1")
        _check(1 <= self.n <= 128, "n", self.n, "an integer from 1 to 128")
        _check(
            isinstance(self.stop, tuple) and all(isinstance(s, str) and s for s in self.stop),
            "stop",
            self.stop,
            "a tuple of strings, none empty",
        )
        _check(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"an integer from 0 to {MAX_LOGPROBS}",
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of the unmodified distribution: of the chosen token, and of the most likely ones."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Delta:
    """One piece of one choice of one request, as it is produced.

    `text` is safe to show: whole characters only, and never part of a stop string. `finish_reason` is None until the
    last piece.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    prompt_tokens: int
    cached_tokens: int


@dataclasses.dataclass
class Completion:
    """One finished choice. `token_ids` keeps every generated token, also those of a stop string cut from `text`."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None

    def add(self, delta: Delta) -> None:
        """Appends a piece of this choice."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            self.logprobs = (self.logprobs or []) + list(delta.logprobs)
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclasses.dataclass
class RequestOutput:
    """All choices of one request. Times are seconds of `time.perf_counter`."""

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    cached_tokens: int = 0
    arrival_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestTiming:
    """What a finished request took, for metrics. Times are seconds of `time.perf_counter`."""

    arrival_s: float
    scheduled_s: float
    first_token_s: float
    finished_s: float
    prompt_tokens: int
    generation_tokens: int
    cached_tokens: int
    finish_reason: FinishReason
    n: int
    max_tokens: int | None
    token_times: tuple[float, ...]


Listener = Callable[[Delta], None]


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt with its parameters, as the scheduling policy sees it. `namespace` keeps prefix caches apart."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival_s: float
    order: int
    max_tokens: int
    seed: int
    listener: Listener | None = None
    client: str = ""
    namespace: Any = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    cached_tokens: int | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)
    unfinished: int = 0


@dataclasses.dataclass(eq=False)
class Sequence:
    """One choice of a request while the engine works on it.

    Tokens `[0, computed)` have their keys and values in the cache; the first `shared_pages` entries of `pages` belong
    to the radix tree and are kept alive by the lock on `node`, the others are private to this sequence. `keys` are the
    tokens of its whole pages, grown as needed. This is what a scheduling policy sees.
    """

    request: Request
    index: int
    tokens: list[int]
    detokenizer: Any = None
    computed: int = 0
    pages: list[int] = dataclasses.field(default_factory=list)
    shared_pages: int = 0
    node: Any = None
    slot: int = -1
    keys: list[tuple[int, ...]] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def client(self) -> str:
        return self.request.client

    @property
    def arrival_s(self) -> float:
        return self.request.arrival_s

    @property
    def order(self) -> tuple[int, int]:
        """Place in order of arrival."""
        return (self.request.order, self.index)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 means a decode step."""
        return len(self.tokens) - self.computed
