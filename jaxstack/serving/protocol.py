"""What clients may ask: OpenAI's request bodies, read strictly.

A field of a wrong type or value is refused by name. So is a field that means something this server cannot do, unless
its value asks for nothing (`frequency_penalty: 0`): silence would change results behind the client's back. Fields that
nobody knows are ignored; clients send extras.
"""

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import pydantic

from jaxstack.engine import Guide, SamplingParams
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.errors import ApiError, bad_field
from jaxstack.serving.guides import GUIDED, read_guide
from jaxstack.serving.json_body import read_json
from jaxstack.serving.messages import read_messages
from jaxstack.serving.tool_choice import Tools, read_tools

log = logging.getLogger(__name__)

# Fields known to mean something we do not do, and the values with which they ask for nothing. None always does.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_whitespace_pattern": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_HINTS = {
    "reasoning_effort": "; hand it to the chat template with chat_template_kwargs",
    "documents": "; hand them to the chat template with chat_template_kwargs",
}
# Fields without influence on the answer.
_HARMLESS = {
    "cache",
    "guided_decoding_backend",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
}

_Request = TypeVar("_Request", bound="Request")


class StreamOptions(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)
    include_usage: bool = False


class Request(pydantic.BaseModel):
    """What both generating endpoints share. None means: the default."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())
    kind: ClassVar[str]

    model: str | None = None
    user: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    priority: int = 0
    seed: int | None = None
    n: int | None = None
    best_of: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    timeout_s: float | None = pydantic.Field(default=None, gt=0)
    return_token_ids: bool | None = None

    @classmethod
    def read(cls: type[_Request], body: bytes) -> _Request:
        """The request in `body`.

        Raises:
          ApiError: 400, naming the field.
        """
        content = read_json(body)
        _refuse_what_is_not_done(content, known=cls.model_fields)
        try:
            request = cls.model_validate(content)
        except pydantic.ValidationError as error:
            raise _first_error(error, content) from None
        request.check()
        return request

    def check(self) -> None:
        """What types cannot say. Raises ApiError."""
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only allowed together with stream: true", param="stream_options")
        if self.stream and self.best_of not in (None, self.n or 1):
            raise ApiError(400, "best_of: not together with stream: the best are known at the end", param="best_of")
        if self.stream and self.prompt_logprobs is not None:
            raise ApiError(400, "prompt_logprobs: not together with stream", param="prompt_logprobs")

    def alternatives(self) -> int | None:
        """Alternatives wanted with each token's log probability; None for no log probabilities."""
        raise NotImplementedError

    def prompt_alternatives(self) -> int | None:
        """The same for the tokens of the prompt."""
        return self.prompt_logprobs

    def token_limit(self) -> int | None:
        """Tokens to generate at most; None for the rest of the window."""
        raise NotImplementedError

    def guide(self) -> Guide | None:
        """The form that the answer must have. Raises ApiError or UserError."""
        return read_guide({name: getattr(self, name) for name in ("response_format", "structured_outputs", *GUIDED)})

    def sampling(self, config: ServerConfig) -> SamplingParams:
        """The engine's parameters. Raises UserError or ApiError for values out of range."""
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            # vLLM's clients say -1 for "all"; more than fits the engine's integers is more than any vocabulary.
            "top_k": None if self.top_k is None else 0 if self.top_k == -1 else min(self.top_k, 2**31 - 1),
            # OpenAI allows any 64-bit integer.
            "seed": None if self.seed is None else self.seed % 2**63,
            "n": self.n,
            "best_of": None if self.best_of == (self.n or 1) else self.best_of,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
        }
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            max_tokens=self.token_limit(),
            logprobs=self.alternatives(),
            prompt_logprobs=self.prompt_alternatives(),
            logit_bias=self._biases(),
            allowed_token_ids=tuple(self.allowed_token_ids) if self.allowed_token_ids else None,
            guide=self.guide(),
            stop=self._stop_strings(config.max_stop_strings),
            stop_token_ids=tuple(self.stop_token_ids or ()),
        )

    def _biases(self) -> dict[int, float] | None:
        biases = {}
        for key, value in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or len(key) > 10:
                raise bad_field("logit_bias", key, "token ids as keys")
            if not -100 <= value <= 100:
                raise bad_field("logit_bias", value, "numbers from -100 to 100")
            biases[int(key)] = value
        return biases or None

    def _stop_strings(self, limit: int) -> tuple[str, ...]:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
            raise bad_field("stop", self.stop, "a string or a list of strings, none empty")
        if len(stop) > limit:
            raise ApiError(400, f"stop: found {len(stop)} strings, expected at most {limit}", param="stop")
        return tuple(stop)


class CompletionRequest(Request):
    """`POST /v1/completions`."""

    kind = "completion"
    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        super().check()
        self.prompts()

    @property
    def prompt_only(self) -> bool:
        """Whether nothing is to be generated: `echo` with `max_tokens: 0` asks about the prompt alone."""
        return bool(self.echo) and self.max_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or as token ids."""
        return read_prompts(self.prompt, "prompt")

    def alternatives(self) -> int | None:
        return self.logprobs

    def prompt_alternatives(self) -> int | None:
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)

    def token_limit(self) -> int | None:
        # The engine's step ends in a token in any case; the answer leaves it out.
        return 1 if self.prompt_only else 16 if self.max_tokens is None else self.max_tokens


class ChatRequest(Request):
    """`POST /v1/chat/completions`."""

    kind = "chat"
    messages: Any = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool = True
    separate_reasoning: bool = True

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: only allowed together with logprobs: true", param="top_logprobs")
        self.messages = read_messages(self.messages)
        self.offered_tools()

    def offered_tools(self) -> Tools | None:
        """The tools that may be called. Raises ApiError."""
        return read_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def template_variables(self) -> dict[str, Any]:
        """Arguments of `Tokenizer.render_chat`."""
        begin_answer = self.add_generation_prompt
        if begin_answer is None:
            begin_answer = not self.continue_final_message
        asked = self.chat_template_kwargs or {}
        own = {"messages", "tools", "add_generation_prompt", "continue_final_message", "self", "context"}
        reserved = own & set(asked)
        if reserved:
            name = sorted(reserved)[0]
            raise ApiError(
                400, f"chat_template_kwargs: {name!r} is not one of its fields", param="chat_template_kwargs"
            )
        return {
            **asked,
            "add_generation_prompt": begin_answer,
            "continue_final_message": self.continue_final_message,
        }


class TokenizeRequest(pydantic.BaseModel):
    """`POST /tokenize`: of a prompt, or of a conversation."""

    model_config = pydantic.ConfigDict(strict=True)
    model: str | None = None
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class LoadAdapterRequest(pydantic.BaseModel):
    """`POST /v1/load_lora_adapter`."""

    model_config = pydantic.ConfigDict(strict=True)
    lora_name: str = pydantic.Field(min_length=1)
    lora_path: str = pydantic.Field(min_length=1)


class UnloadAdapterRequest(pydantic.BaseModel):
    """`POST /v1/unload_lora_adapter`."""

    model_config = pydantic.ConfigDict(strict=True)
    lora_name: str = pydantic.Field(min_length=1)


class DetokenizeRequest(pydantic.BaseModel):
    """`POST /detokenize`."""

    model_config = pydantic.ConfigDict(strict=True)
    model: str | None = None
    tokens: list[int]


_Model = TypeVar("_Model", bound=pydantic.BaseModel)


def read_as(model: type[_Model], body: bytes) -> _Model:
    """`body` as a `model`. Raises ApiError."""
    content = read_json(body)
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        raise _first_error(error, content) from None


def read_prompts(found: Any, where: str) -> list[str | list[int]]:
    """A text, several, token ids, or several lists of them. Raises ApiError."""
    if isinstance(found, str):
        return [found]
    if isinstance(found, list) and found:
        if all(_is_integer(token) for token in found):
            return [found]
        if all(isinstance(text, str) for text in found):
            return list(found)
        if all(isinstance(ids, list) and ids and all(_is_integer(token) for token in ids) for ids in found):
            return list(found)
    expected = "a string, a list of strings, a list of token ids, or a list of such lists, none empty"
    raise bad_field(where, found, expected)


def _refuse_what_is_not_done(content: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    unknown = []
    for name, value in content.items():
        if value is None or name in _HARMLESS:
            continue
        if name in _NOT_DONE and value not in _NOT_DONE[name]:
            raise _not_done(name)
        if name not in known and name not in _NOT_DONE:
            unknown.append(name)
    if unknown:
        log.debug("ignored %d unknown fields: %s", len(unknown), ", ".join(sorted(unknown)[:10]))


def _not_done(name: str) -> ApiError:
    message = f"{name}: not supported by this server{_HINTS.get(name, '')}"
    return ApiError(400, message, param=name, code="unsupported_parameter")


def _first_error(error: pydantic.ValidationError, content: Mapping[str, Any]) -> ApiError:
    first = error.errors(include_url=False, include_input=True)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return ApiError(400, f"{where}: missing", param=where)
    expected = first["msg"].removeprefix("Input should be ")
    return bad_field(where, first["input"], expected)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
