"""What goes into the engine and what comes out: sampling parameters, pieces of answers, whole answers.

Plain data, no jax. `Sequence` is the engine's own record of one choice of one request while it lives.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from jaxstack.engine.adapters import Adapter
from jaxstack.engine.pooling import Pooled
from jaxstack.engine.prompt_embeddings import GivenEmbeddings
from jaxstack.runtime.errors import UserError

FinishReason = Literal["stop", "length", "abort", "error", "timeout"]

MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
# A grammar's text, in bytes, and the strings of a choice.
MAX_GUIDE_BYTES = 1 << 18
MAX_CHOICES = 4096

GuideKind = Literal["json_schema", "json_object", "regex", "lark", "choice"]
LogprobsMode = Literal["raw", "processed"]


def _check(ok: bool, name: str, found: Any, expected: str) -> None:
    if not ok:
        raise UserError(f"{name}: found {found!r}, expected {expected}")


def _check_integers(values: Iterable[Any], name: str) -> None:
    for value in values:
        _check(isinstance(value, int) and not isinstance(value, bool) and value >= 0, name, value, "token ids >= 0")


@dataclasses.dataclass(frozen=True)
class Guide:
    """A grammar that an answer must follow.

    Args:
      kind: "json_schema" (`text` is the schema), "json_object" (any JSON object; no text), "regex", "lark" (a grammar
        in Lark's notation), or "choice" (`text` is a JSON list of strings, of which the answer is one).
      text: what `kind` says.

    Raises:
      UserError: an unknown kind, or a text that is not what the kind asks for. A schema, a regular expression or a
        grammar that is well-formed here may still be refused when it is compiled.
    """

    kind: GuideKind
    text: str = ""

    def __post_init__(self) -> None:
        kinds = get_args(GuideKind)
        _check(self.kind in kinds, "guide", self.kind, "one of " + ", ".join(kinds))
        _check(isinstance(self.text, str), self.kind, self.text, "a string")
        try:
            length = len(self.text.encode())
        except UnicodeEncodeError:
            raise UserError(f"{self.kind}: found half of a surrogate pair, expected valid Unicode") from None
        if length > MAX_GUIDE_BYTES:
            raise UserError(f"{self.kind}: found {length} bytes, expected at most {MAX_GUIDE_BYTES}")
        if self.kind == "json_object":
            _check(not self.text, self.kind, self.text, "no text")
            return
        if not self.text:
            raise UserError(f"{self.kind}: found an empty text, expected one")
        if self.kind == "json_schema":
            schema = self._json("a JSON schema")
            _check(
                isinstance(schema, (dict, bool)), self.kind, schema, "a JSON schema, which is an object or a boolean"
            )
        elif self.kind == "choice":
            strings = self._json("a JSON list of strings")
            ok = isinstance(strings, list) and bool(strings) and all(isinstance(s, str) and s for s in strings)
            _check(ok, self.kind, strings, "a JSON list of strings, none empty, at least one")
            _check(len(strings) <= MAX_CHOICES, self.kind, len(strings), f"at most {MAX_CHOICES} strings")

    def _json(self, expected: str) -> Any:
        try:
            return json.loads(self.text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.kind}: found no valid JSON ({error}), expected {expected}") from None


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are drawn and where they end.

    The order in which logits are changed: `logit_bias`, `allowed_token_ids` and `guide`, `min_tokens`, the penalties,
    `temperature`, `top_k`, `top_p`, `min_p`.

    Args:
      max_tokens: tokens to generate at most; None means the rest of the window.
      temperature: 0 (anything below 1e-5) is greedy.
      top_p: nucleus mass in (0, 1]; renormalised after `top_k`.
      top_k: candidates kept; 0 means all.
      min_p: tokens less likely than this share of the likeliest one are left out; 0 means none are.
      presence_penalty: subtracted from the logit of every token generated so far.
      frequency_penalty: subtracted as often as the token was generated.
      repetition_penalty: divides the positive and multiplies the negative logits of all tokens of prompt and answer; 1
        changes nothing.
      logit_bias: added to the logits of these token ids. Given as a mapping (or pairs), kept as pairs ascending by id.
      allowed_token_ids: no other token is drawn. Kept ascending and distinct.
      min_tokens: no end token, and none of `stop_token_ids`, before this many.
      seed: with a seed a request gives the same tokens in any batch; None draws one from the engine's own generator.
      n: choices per prompt. The prompt is computed once.
      best_of: choices generated, of which the `n` with the highest sum of logprobs are given back; None means `n`.
      stop: strings that end an answer; the text is cut before them unless `include_stop_str_in_output`.
      stop_token_ids: token ids that end an answer, beside the model's own end tokens.
      ignore_eos: generate on past the model's end tokens.
      logprobs: alternatives reported with each token (0: the chosen one alone); None reports nothing.
      prompt_logprobs: the same for the tokens of the prompt.
      logprobs_mode: "raw" reports the model's own distribution, "processed" the one that the token was drawn from.
      guide: the grammar that the answer follows.
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
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    best_of: int | None = None
    prompt_logprobs: int | None = None
    logprobs_mode: LogprobsMode = "raw"
    guide: Guide | None = None

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
        _check_integers(self.stop_token_ids, "stop_token_ids")
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            _check(value is None or 0 <= value <= MAX_LOGPROBS, name, value, f"an integer from 0 to {MAX_LOGPROBS}")
        modes = get_args(LogprobsMode)
        _check(self.logprobs_mode in modes, "logprobs_mode", self.logprobs_mode, " or ".join(modes))
        _check(0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(-2.0 <= getattr(self, name) <= 2.0, name, getattr(self, name), "a number from -2 to 2")
        _check(
            0.0 < self.repetition_penalty < float("inf"),
            "repetition_penalty",
            self.repetition_penalty,
            "a finite number above 0",
        )
        longest = (
            "an integer >= 0" if self.max_tokens is None else f"an integer from 0 to max_tokens = {self.max_tokens}"
        )
        _check(0 <= self.min_tokens <= (self.max_tokens or 2**31), "min_tokens", self.min_tokens, longest)
        _check(
            self.best_of is None or self.n <= self.best_of <= 128,
            "best_of",
            self.best_of,
            f"an integer from n = {self.n} to 128",
        )
        _check(self.guide is None or isinstance(self.guide, Guide), "guide", self.guide, "a Guide")
        self._keep_biases()
        if self.allowed_token_ids is not None:
            _check_integers(self.allowed_token_ids, "allowed_token_ids")
            _check(
                len(self.allowed_token_ids) > 0, "allowed_token_ids", self.allowed_token_ids, "at least one token id"
            )
            object.__setattr__(self, "allowed_token_ids", tuple(sorted(set(self.allowed_token_ids))))

    def _keep_biases(self) -> None:
        """Checks `logit_bias` and brings it into the form it is kept in."""
        given = self.logit_bias
        if given is None:
            return
        pairs = tuple(sorted(given.items() if isinstance(given, Mapping) else given))
        _check(len(pairs) <= MAX_LOGIT_BIAS, "logit_bias", len(pairs), f"at most {MAX_LOGIT_BIAS} entries")
        _check_integers((token for token, _ in pairs), "logit_bias")
        _check(len({token for token, _ in pairs}) == len(pairs), "logit_bias", pairs, "each token id once")
        for token, value in pairs:
            _check(-100.0 <= value <= 100.0, f"logit_bias[{token}]", value, "a number from -100 to 100")
        object.__setattr__(self, "logit_bias", tuple((token, float(value)) for token, value in pairs) or None)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept: pairs ascending by token id."""
        assert self.logit_bias is None or isinstance(self.logit_bias, tuple)
        return self.logit_bias or ()

    @property
    def choices(self) -> int:
        """Sequences that are generated: `best_of`, or `n`."""
        return self.best_of or self.n

    @property
    def penalised(self) -> bool:
        """Whether the tokens so far change the logits of the next."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    @functools.cached_property
    def ruled(self) -> bool:
        """Whether anything but temperature, top-k, top-p and min-p changes what is drawn or reported."""
        lists = self.logit_bias or self.allowed_token_ids or self.guide
        return bool(lists or self.min_tokens or self.penalised or self.logprobs_mode != "raw")

    def check_token_ids(self, vocab_size: int) -> None:
        """Raises UserError if a token id of `logit_bias` or `allowed_token_ids` is not below `vocab_size`."""
        ids = {"logit_bias": [token for token, _ in self.biases], "allowed_token_ids": self.allowed_token_ids or ()}
        for name, values in ids.items():
            if values:  # ascending
                _check(values[-1] < vocab_size, name, values[-1], f"token ids from 0 to {vocab_size - 1}")

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
    last piece. `discarded_tokens` were generated for choices that `best_of` did not keep; one piece of a request counts
    them. The first piece of choice 0 carries `prompt_logprobs`, one entry a prompt token and None for the first, if
    they were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    prompt_tokens: int
    cached_tokens: int
    discarded_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    weights_version: int = 0


@dataclasses.dataclass
class Completion:
    """One finished choice. `token_ids` keeps every generated token, also those of a stop string cut from `text`."""

    index: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprob] | None = None
    weights_version: int = 0

    def add(self, delta: Delta) -> None:
        """Appends a piece of this choice."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs:
            self.logprobs = (self.logprobs or []) + list(delta.logprobs)
        self.weights_version = delta.weights_version
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclasses.dataclass
class RequestOutput:
    """All choices of one request. Times are seconds of `time.perf_counter`.

    `discarded_tokens` were generated for choices that `best_of` did not keep. `prompt_logprobs` has an entry for each
    prompt token, None for the first.
    """

    request_id: str
    prompt_token_ids: list[int]
    completions: list[Completion]
    cached_tokens: int = 0
    arrival_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float | None = None
    discarded_tokens: int = 0
    prompt_logprobs: list[TokenLogprob | None] | None = None


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
    """One prompt with its parameters, as the scheduling policy sees it.

    `namespace` keeps prefix caches apart. Lower `priority` goes first. At `deadline_s` (of `time.perf_counter`) it ends
    with what it has. `unfinished` choices of it are still generated. `scores` gathers the logprobs of the prompt's own
    tokens where they are wanted; choice 0 computes them. `given` holds the vectors that stand in the prompt where its
    token is 0 for want of one. `pooled` gathers hidden states, and no token is wanted. `emitted` is what another engine
    has drawn of each choice, None for one that has ended: answers go on behind it.
    """

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
    adapter: Adapter | None = None
    scheduled_s: float | None = None
    first_token_s: float | None = None
    cached_tokens: int | None = None
    token_times: list[float] = dataclasses.field(default_factory=list)
    unfinished: int = 0
    priority: int = 0
    deadline_s: float | None = None
    scores: Any = None
    grammar: Any = None
    given: GivenEmbeddings | None = None
    pooled: Pooled | None = None
    emitted: tuple[tuple[int, ...] | None, ...] | None = None

    def needs_hidden(self, start: int) -> bool:
        """Whether a row at that position belongs in a step that takes given embeddings and hands out hidden states."""
        return self.pooled is not None or (self.given is not None and start < len(self.prompt))

    @property
    def choices(self) -> int:
        """How many are generated: more than are given back if the best of them are."""
        return self.sampling.choices

    @property
    def begun(self) -> dict[int, tuple[int, ...]]:
        """The choices that are generated, and of each what there is already."""
        emitted = ((),) * self.choices if self.emitted is None else self.emitted
        return {index: tokens for index, tokens in enumerate(emitted) if tokens is not None}

    @property
    def ranked(self) -> bool:
        """Whether the choices with the highest sum of logprobs are picked when all have ended."""
        return self.choices > self.sampling.n

    @property
    def logprobs(self) -> int | None:
        """Alternatives to report with every token, or None where not even the chosen token's logprob is needed."""
        return 0 if self.sampling.logprobs is None and self.ranked else self.sampling.logprobs


@dataclasses.dataclass(eq=False)
class Sequence:
    """One choice of a request while the engine works on it.

    Tokens `[0, computed)` have their keys and values in the cache; the first `shared_pages` entries of `pages` belong
    to the radix tree and are kept alive by the lock on `node`, the others are private to this sequence. `keys` are the
    tokens of its whole pages, grown as needed. This is what a scheduling policy sees.

    Steps are launched ahead of their results: `pending` tokens have been drawn that are not in `tokens` yet, and
    `in_flight` launched rows have not settled. `computed` counts launched rows. `matcher` follows the grammar of a
    guided answer, through the tokens in `tokens`.
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
    pending: int = 0
    in_flight: int = 0
    cumulative_logprob: float = 0.0
    drafter: Any = None
    matcher: Any = None

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
    def priority(self) -> int:
        return self.request.priority

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def max_tokens(self) -> int:
        return self.request.max_tokens

    @property
    def order(self) -> tuple[int, int]:
        """Place in order of arrival."""
        return (self.request.order, self.index)

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def length(self) -> int:
        """Tokens, those drawn and not yet read among them."""
        return len(self.tokens) + self.pending

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 means a decode step."""
        return self.length - self.computed

    @property
    def scoring(self) -> bool:
        """Whether its steps are to score the prompt's own tokens."""
        scores = self.request.scores
        return scores is not None and self.index == 0 and not scores.complete

    @property
    def complete(self) -> bool:
        """Whether the last token allowed has been drawn, read or not: no further step is needed."""
        return self.length - len(self.request.prompt) >= self.request.max_tokens
