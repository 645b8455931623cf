"""From a request body to what the engine takes: token ids and sampling parameters.

All of it runs on a pool thread: JSON, chat templates and tokenization must not hold up the event loop.
"""

import dataclasses
from typing import Any

from jaxstack.engine import Engine, SamplingParams
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.serving.config import ServerConfig
from jaxstack.serving.errors import ApiError, bad_field, shorten
from jaxstack.serving.guides import after_thinking, tool_guide
from jaxstack.serving.message import PLAIN_TEXT, Reading
from jaxstack.serving.messages import read_messages
from jaxstack.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Request,
    TokenizeRequest,
    read_as,
)
from jaxstack.serving.reasoning import END, ReasoningFormat, reasoning_format, thinking_begun
from jaxstack.serving.tool_choice import Tools, messages_as_text
from jaxstack.serving.tools import MARKERS, ToolFormat, tool_format


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that has been found good.

    Attributes:
      request: as it came.
      prompts: token ids, one list a prompt.
      sampling: for each of them.
      timeout_s: when the answer ends at the latest, in seconds from now.
      adapter: the LoRA adapter that answers; None for the model itself.
      echo: texts to put before the answers, one a prompt; None unless asked for.
      logprobs: alternatives to show with each token; None shows no log probabilities.
      prompt_only: what is generated is left out.
      reading: how a chat's answers become messages.
      client: whose it is, for the scheduling policy.
    """

    request: Request
    prompts: list[list[int]]
    sampling: SamplingParams
    timeout_s: float | None
    adapter: str | None = None
    echo: list[str] | None = None
    logprobs: int | None = None
    prompt_only: bool = False
    reading: Reading = PLAIN_TEXT
    client: str = ""


def completion_job(body: bytes, engine: Engine, config: ServerConfig) -> Job:
    """Raises ApiError or UserError."""
    request = CompletionRequest.read(body)
    adapter = adapter_of(request.model, engine, config)
    sampling = request.sampling(config)
    given = request.prompts()
    _check_choices(len(given), sampling, config)
    prompts, echo = [], []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append(need_tokenizer(engine).encode(prompt, add_special_tokens=request.add_special_tokens))
        else:
            prompts.append(prompt)
        prompts[-1] = engine.check_prompt(prompts[-1], sampling)
        if request.echo:
            echo.append(prompt if isinstance(prompt, str) else need_tokenizer(engine).decode(prompt))
    return Job(
        request,
        prompts,
        sampling,
        _timeout(request, config),
        adapter,
        echo=echo if request.echo else None,
        logprobs=request.alternatives(),
        prompt_only=request.prompt_only,
    )


def chat_job(body: bytes, engine: Engine, config: ServerConfig) -> Job:
    """Raises ApiError or UserError."""
    request = ChatRequest.read(body)
    adapter = adapter_of(request.model, engine, config)
    sampling = request.sampling(config)
    _check_choices(1, sampling, config)
    tokenizer = need_tokenizer(engine)
    tools = request.offered_tools()
    if tools is not None and config.tool_parser == "none":
        raise ApiError(400, "tools: calls are not read by this server (tool_parser none)", param="tools")
    text, tokens = _chat_prompt(tokenizer, request.messages, request.template_variables(), tools)
    marks_thinking = reasoning_parser(tokenizer, config) is not None
    begun = marks_thinking and thinking_begun(text, request.messages, request.continue_final_message)
    reading = Reading(begun if marks_thinking and request.separate_reasoning else None, request.include_reasoning)
    guide, forced = sampling.guide, tools is not None and tools.required
    if tools is not None:
        notation = tool_parser(tokenizer, config)
        reading = dataclasses.replace(reading, tools=(tools, notation))
        if forced:
            if guide is not None:
                raise ApiError(400, "tool_choice: a call is required, and another form too", param="tool_choice")
            guide = tool_guide(tools, notation, tokenizer)
        if tokenizer.token_to_id(MARKERS[notation]) in tokenizer.special_ids and notation != "llama3":
            # The marker has to reach the reader. Llama 3's can be missed: its calls are known without.
            sampling = dataclasses.replace(sampling, skip_special_tokens=False)
    if guide is not None:
        if marks_thinking and (begun or END not in text[-2 * len(END) :]):
            guide = after_thinking(guide, begun=begun, tokenizer=tokenizer, ours=forced)
        sampling = dataclasses.replace(sampling, guide=guide)
    tokens = engine.check_prompt(tokens, sampling)
    timeout_s = _timeout(request, config)
    return Job(request, [tokens], sampling, timeout_s, adapter, logprobs=request.alternatives(), reading=reading)


def reasoning_parser(tokenizer: Tokenizer, config: ServerConfig) -> ReasoningFormat | None:
    """How thinking is marked; None if it is not told apart."""
    if config.reasoning_parser == "auto":
        return reasoning_format(tokenizer)
    return None if config.reasoning_parser == "none" else config.reasoning_parser


def tool_parser(tokenizer: Tokenizer, config: ServerConfig) -> ToolFormat:
    """The notation of calls. Hermes's where the template teaches none, for then our own instructions do."""
    if config.tool_parser in ("auto", "none"):
        return tool_format(tokenizer) or "hermes"
    return config.tool_parser  # type: ignore[return-value]


def tokenize(body: bytes, engine: Engine, config: ServerConfig) -> dict[str, Any]:
    """The answer to `POST /tokenize`. Raises ApiError or UserError."""
    request = read_as(TokenizeRequest, body)
    adapter_of(request.model, engine, config)
    tokenizer = need_tokenizer(engine)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "prompt: expected either prompt or messages", param="prompt")
    if request.prompt is not None:
        tokens = tokenizer.encode(request.prompt, add_special_tokens=request.add_special_tokens is not False)
    else:
        chat = ChatRequest(
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        _, tokens = _chat_prompt(tokenizer, read_messages(request.messages), chat.template_variables(), None)
    answer: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens}
    if request.return_token_strs:
        answer["token_strs"] = [tokenizer.id_to_token(token) for token in tokens]
    return answer


def detokenize(body: bytes, engine: Engine, config: ServerConfig) -> dict[str, Any]:
    """The answer to `POST /detokenize`. Raises ApiError or UserError."""
    request = read_as(DetokenizeRequest, body)
    adapter_of(request.model, engine, config)
    tokenizer = need_tokenizer(engine)
    for token in request.tokens:
        if not 0 <= token < engine.model_config.vocab_size:
            raise bad_field("tokens", token, f"ids from 0 to {engine.model_config.vocab_size - 1}")
    return {"prompt": tokenizer.decode(request.tokens, skip_special_tokens=False)}


def adapter_of(name: str | None, engine: Engine, config: ServerConfig) -> str | None:
    """The adapter that is served as `name`; None if that is the model itself, or nothing was named.

    Raises:
      ApiError: 404, there is no such model.
    """
    if name is None or name == config.model_name:
        return None
    if name in engine.adapters:
        return name
    here = ", ".join(repr(known) for known in (config.model_name, *engine.adapters))
    message = f"model: {shorten(name)} does not exist here; this server has {here}"
    raise ApiError(404, message, param="model", code="model_not_found")


def need_tokenizer(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None:
        raise UserError("prompt: this engine has no tokenizer; expected token ids")
    return engine.tokenizer


def _chat_prompt(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], variables: dict[str, Any], tools: Tools | None
) -> tuple[str, list[int]]:
    """The rendered conversation and its tokens."""
    if tool_format(tokenizer) is not None:
        variables = {**variables, **({} if tools is None else {"tools": list(tools.offered)})}
    elif tools is not None or any(m["role"] == "tool" or m.get("tool_calls") for m in messages):
        messages = messages_as_text(messages, tools)
    try:
        text = tokenizer.render_chat(messages, **variables)
    except UserError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    return text, tokenizer.encode(text, add_special_tokens=False)


def _check_choices(prompts: int, sampling: SamplingParams, config: ServerConfig) -> None:
    if prompts * sampling.choices > config.max_choices:
        name = "n" if sampling.best_of is None else "best_of"
        found = f"{prompts} prompts times {name} = {sampling.choices}"
        raise ApiError(
            400, f"{name}: found {found}, expected at most {config.max_choices} choices together", param=name
        )


def _timeout(request: Request, config: ServerConfig) -> float | None:
    limits = [t for t in (request.timeout_s, config.request_timeout_s) if t is not None]
    return min(limits, default=None)
