"""One protocol for everything above the engine that talks to a language model, with two implementations.

`EngineModel` is an engine in this process, `EndpointModel` any OpenAI-compatible server. A prompt is a string,
continued as it stands, or a list of messages, put through the model's chat template. Callers need not know which one
they hold.
"""

import asyncio
import dataclasses
import json
import urllib.parse
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import httpx
import openai

from jaxstack.engine import Completion, Delta, Engine, Guide, SamplingParams, TokenLogprob
from jaxstack.models.chat_template import Messages
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.runtime.errors import UserError

Prompt = str | Messages

# Sampling parameters that OpenAI does not have, under vLLM's names.
_EXTENDED = (
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "allowed_token_ids",
    "stop_token_ids",
    "ignore_eos",
    "include_stop_str_in_output",
    "skip_special_tokens",
)
Sampling = SamplingParams | Sequence[SamplingParams]


@dataclasses.dataclass(frozen=True)
class RequestResult:
    """The answers to one prompt.

    Attributes:
      completions: `n` of them, in order. Over an endpoint `logprobs` is None, and `token_ids` is empty unless the
        server reports them.
      prompt_tokens: of the prompt, in tokens.
      cached_tokens: of these, found in the prefix cache.
    """

    completions: list[Completion]
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.completions[0].text

    @property
    def completion_tokens(self) -> int:
        """Of all answers; 0 if the server does not report token ids."""
        return sum(len(completion.token_ids) for completion in self.completions)


class LanguageModel(Protocol):
    """Text or messages in, answers out."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        chat_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestResult]:
        """Answers all prompts, in the order given; blocks.

        Args:
          sampling: one for all, or one for each prompt.
          chat_kwargs: for the chat template, for instance `{"enable_thinking": False}` or
            `{"continue_final_message": True, "add_generation_prompt": False}`.

        Raises:
          UserError: a prompt or a parameter is wrong, or the endpoint cannot be reached.
        """
        ...

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, chat_kwargs: Mapping[str, Any] | None = None
    ) -> AsyncIterator[Delta]:
        """The pieces of an answer as they come; closing the iterator ends the request. Raises as `generate`."""
        ...


class EngineModel:
    """An engine in this process."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        chat_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestResult]:
        """See `LanguageModel.generate`."""
        tokens = [self._tokens(prompt, chat_kwargs) for prompt in prompts]
        outputs = self.engine.generate(tokens, sampling)
        return [RequestResult(o.completions, len(o.prompt_token_ids), o.cached_tokens) for o in outputs]

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, chat_kwargs: Mapping[str, Any] | None = None
    ) -> AsyncIterator[Delta]:
        """See `LanguageModel.stream`. Starts the engine's thread if need be."""
        await asyncio.to_thread(self.engine.start)
        pieces = self.engine.stream(self._tokens(prompt, chat_kwargs), sampling)
        try:
            async for delta in pieces:
                yield delta
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    def _tokens(self, prompt: Prompt, chat_kwargs: Mapping[str, Any] | None) -> list[int]:
        tokenizer: Tokenizer | None = self.engine.tokenizer
        if tokenizer is None:
            raise UserError("prompt: this engine has no tokenizer, and takes token ids only")
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        return tokenizer.encode(tokenizer.render_chat(prompt, **(chat_kwargs or {})), add_special_tokens=False)


class EndpointModel:
    """A server that speaks OpenAI's protocol.

    Refusals for being busy (429, 5xx) and lost connections are tried again, with growing pauses.

    Args:
      base_url: with the "/v1".
      model: its name there; by default the first the server lists.
      api_key: sent as bearer token.
      extended: whether the server takes vLLM's fields (`top_k`, `ignore_eos`, `return_token_ids`,
        `chat_template_kwargs`, ...), as ours does. Without, sampling parameters that need them are refused.
      concurrency: requests sent at once by `generate`.
      max_retries: further tries of a request.
      timeout_s: of one try.
    """

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        extended: bool = True,
        concurrency: int = 64,
        max_retries: int = 5,
        timeout_s: float = 600.0,
    ):
        self.base_url, self._model, self._extended = base_url, model, extended
        self._concurrency = concurrency
        self._settings: dict[str, Any] = {
            "base_url": base_url,
            "api_key": api_key or "none",
            "max_retries": max_retries,
            "timeout": timeout_s,
        }
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        # A proxy from the environment must not come between us and a server on this machine.
        host = urllib.parse.urlsplit(base_url).hostname
        self._http: dict[str, Any] = {"limits": limits, "trust_env": host not in ("127.0.0.1", "localhost", "::1")}
        self._client = openai.OpenAI(**self._settings, http_client=openai.DefaultHttpxClient(**self._http))

    def __enter__(self) -> "EndpointModel":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def async_client(self) -> openai.AsyncOpenAI:
        """A client with the same settings, for the running event loop; to be closed by whoever asked for it."""
        return openai.AsyncOpenAI(**self._settings, http_client=openai.DefaultAsyncHttpxClient(**self._http))

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | None = None,
        *,
        chat_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestResult]:
        """See `LanguageModel.generate`."""
        each = list(sampling) if isinstance(sampling, Sequence) else [sampling or SamplingParams()] * len(prompts)
        if len(each) != len(prompts):
            raise UserError(f"sampling: found {len(each)}, expected one for each of {len(prompts)} prompts")
        with ThreadPoolExecutor(min(self._concurrency, max(1, len(prompts))), thread_name_prefix="endpoint") as pool:
            return list(pool.map(lambda prompt, params: self._ask(prompt, params, chat_kwargs), prompts, each))

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, *, chat_kwargs: Mapping[str, Any] | None = None
    ) -> AsyncIterator[Delta]:
        """See `LanguageModel.stream`. Token counts come with the last piece, if the server reports them."""
        body = await asyncio.to_thread(self._body, prompt, sampling or SamplingParams(), chat_kwargs)
        async with self.async_client() as client:
            create = client.completions.create if isinstance(prompt, str) else client.chat.completions.create
            with plain_errors(self.base_url):
                async with await create(**body, stream=True) as chunks:
                    async for chunk in chunks:
                        for choice in chunk.choices:
                            delta = _delta(choice)
                            if delta.text or delta.token_ids or delta.finish_reason:
                                yield delta

    def _ask(self, prompt: Prompt, sampling: SamplingParams, chat_kwargs: Mapping[str, Any] | None) -> RequestResult:
        body = self._body(prompt, sampling, chat_kwargs)
        client: Any = self._client
        create = client.completions.create if isinstance(prompt, str) else client.chat.completions.create
        with plain_errors(self.base_url):
            response = create(**body)
        completions = [
            Completion(
                index=choice.index,
                text=(choice.text if isinstance(prompt, str) else choice.message.content) or "",
                token_ids=list(getattr(choice, "token_ids", None) or ()),
                finish_reason=choice.finish_reason,
                stop_reason=getattr(choice, "stop_reason", None),
            )
            for choice in sorted(response.choices, key=lambda choice: choice.index)
        ]
        usage = response.usage
        if usage is None:
            return RequestResult(completions)
        details = usage.prompt_tokens_details
        return RequestResult(completions, usage.prompt_tokens, (details and details.cached_tokens) or 0)

    def _body(self, prompt: Prompt, sampling: SamplingParams, chat_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        """Arguments of the client's `create`."""
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(sampling, name) is not None:
                raise UserError(f"{name}: an endpoint names tokens by text, not by id; ask it with the openai client")
        body: dict[str, Any] = {
            "model": self.model,
            "n": sampling.n,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        plain = SamplingParams()
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(sampling, name) != getattr(plain, name):
                body[name] = getattr(sampling, name)
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): value for token, value in dict(sampling.logit_bias).items()}
        extra = {name: getattr(sampling, name) for name in _EXTENDED if getattr(sampling, name) != getattr(plain, name)}
        if "allowed_token_ids" in extra:
            extra["allowed_token_ids"] = list(sampling.allowed_token_ids or ())
        if sampling.guide is not None:
            extra["structured_outputs"] = _structured_outputs(sampling.guide)
        if sampling.best_of is not None and isinstance(prompt, str):
            body["best_of"] = sampling.best_of
        elif sampling.best_of is not None:
            extra["best_of"] = sampling.best_of
        if isinstance(prompt, str):
            body["prompt"] = prompt
        else:
            body["messages"] = list(prompt)
            if self._extended:
                # Thinking stays in the text, as with an engine of our own.
                extra["separate_reasoning"] = False
            template = dict(chat_kwargs or {})
            for name in ("add_generation_prompt", "continue_final_message"):
                if name in template:
                    extra[name] = template.pop(name)
            if template:
                extra["chat_template_kwargs"] = template
        limit = sampling.max_tokens
        if limit is None and isinstance(prompt, str):
            limit = self._rest_of_window(prompt)
        if limit is not None:
            body["max_tokens"] = limit
        if extra and not self._extended:
            raise UserError(f"{sorted(extra)[0]}: this endpoint takes OpenAI's own fields only (extended=False)")
        if self._extended:
            body["extra_body"] = {**extra, "return_token_ids": True}
        return body

    @property
    def model(self) -> str:
        """The model's name, asked for once if it was not given."""
        if self._model is None:
            with plain_errors(self.base_url):
                self._model = next(iter(self._client.models.list())).id
        return self._model

    def _rest_of_window(self, prompt: str) -> int:
        """Tokens left for an answer. OpenAI's completions stop after 16 if not told otherwise."""
        if not self._extended:
            raise UserError("max_tokens: found None, expected a number (extended=False)")
        root = self.base_url.rstrip("/").removesuffix("/v1")
        with plain_errors(self.base_url):
            content = {"model": self.model, "prompt": prompt}
            counted = self._client.post(f"{root}/tokenize", body=content, cast_to=dict[str, Any])
        return max(1, counted["max_model_len"] - counted["count"])


def _structured_outputs(guide: Guide) -> dict[str, Any]:
    """A guide in vLLM's words."""
    if guide.kind == "json_object":
        return {"json_object": True}
    if guide.kind == "choice":
        return {"choice": json.loads(guide.text)}
    return {{"json_schema": "json", "regex": "regex", "lark": "grammar"}[guide.kind]: guide.text}


class plain_errors:
    """Turns the client's exceptions for a user's mistakes into one line."""

    def __init__(self, base_url: str):
        self._base_url = base_url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, openai.APIStatusError):
            body = error.body if isinstance(error.body, dict) else {}
            raise UserError(f"{self._base_url}: {error.status_code}: {body.get('message') or error.message}") from error
        if isinstance(error, openai.APIConnectionError):
            raise UserError(
                f"{self._base_url}: cannot be reached ({type(error.__cause__ or error).__name__})"
            ) from error
        if isinstance(error, openai.APIError):
            raise UserError(f"{self._base_url}: {error.message}") from error


def _delta(choice: Any) -> Delta:
    message = getattr(choice, "delta", None)
    logprobs: tuple[TokenLogprob, ...] = ()
    return Delta(
        index=choice.index,
        text=(choice.text if message is None else message.content) or "",
        token_ids=tuple(getattr(choice, "token_ids", None) or ()),
        logprobs=logprobs,
        finish_reason=choice.finish_reason,
        stop_reason=getattr(choice, "stop_reason", None),
        prompt_tokens=0,
        cached_tokens=0,
    )
