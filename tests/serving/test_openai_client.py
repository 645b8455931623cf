"""The real openai client against the real server and engine: what it gets is what the engine says."""

import asyncio
from typing import Any

import openai
import pytest

from jaxstack.engine import Engine, SamplingParams
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.serving import BackgroundServer

TOKENIZER = byte_tokenizer()
# Always twelve tokens: a random model may draw an end token any time.
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def greedy(**extra: Any) -> dict[str, Any]:
    """GREEDY with further fields that the client does not know."""
    return {**GREEDY, "extra_body": {"ignore_eos": True, **extra}}


TALK: list[Any] = [{"role": "user", "content": "hello"}]


def expected(engine: Engine, prompt: str | list[int], **sampling: Any) -> str:
    """The engine's own greedy answer."""
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling})
    return engine.generate([prompt], params)[0].completions[0].text


def test_models(client: openai.OpenAI, engine: Engine) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.model_extra["max_model_len"] == engine.max_model_len
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert error.value.code == "model_not_found"


def test_completion_of_text_and_tokens(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(prompt="hello", **GREEDY)
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-") and answer.model == "tiny"
    (choice,) = answer.choices
    assert choice.text == expected(engine, "hello")
    assert choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens == 12 and answer.usage.total_tokens == 17
    tokens = client.completions.create(prompt=TOKENIZER.encode("hello"), **GREEDY)
    assert tokens.choices[0].text == choice.text


def test_several_prompts_and_choices(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(prompt=["ab", "cd"], n=2, **GREEDY)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts == [expected(engine, "ab")] * 2 + [expected(engine, "cd")] * 2
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == 48
    lists = client.completions.create(prompt=[TOKENIZER.encode("ab"), TOKENIZER.encode("cd")], n=2, **GREEDY)
    assert [choice.text for choice in lists.choices] == texts


def test_echo(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(prompt=["hé", "x"], n=2, echo=True, **GREEDY)
    assert [c.text for c in answer.choices] == ["hé" + expected(engine, "hé")] * 2 + ["x" + expected(engine, "x")] * 2
    streamed = client.completions.create(prompt=[104, 105], echo=True, stream=True, **GREEDY)
    assert "".join(c.text for chunk in streamed for c in chunk.choices) == "hi" + expected(engine, "hi")


def test_defaults(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="x", seed=1, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    again = client.completions.create(model="tiny", prompt="x", seed=1, extra_body={"ignore_eos": True})
    other = client.completions.create(model="tiny", prompt="x", seed=-2, extra_body={"ignore_eos": True})
    assert again.choices[0].text == answer.choices[0].text != other.choices[0].text
    # A chat without max_tokens may use the whole window.
    long = client.chat.completions.create(model="tiny", messages=TALK, seed=1, extra_body={"ignore_eos": True})
    assert long.usage.total_tokens == client.models.retrieve("tiny").model_extra["max_model_len"]
    assert long.choices[0].finish_reason == "length"


def test_stop(client: openai.OpenAI, engine: Engine) -> None:
    whole = expected(engine, "hello")
    stop = whole[4:6]
    answer = client.completions.create(prompt="hello", stop=[stop, "never seen"], **GREEDY).choices[0]
    assert answer.text == whole[: whole.index(stop)] and answer.finish_reason == "stop"
    assert answer.model_extra["stop_reason"] == stop
    kept = client.completions.create(prompt="hello", stop=stop, **greedy(include_stop_str_in_output=True)).choices[0]
    assert kept.text == whole[: whole.index(stop) + len(stop)]
    streamed = client.completions.create(prompt="hello", stop=stop, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.text


def test_streamed_completion(client: openai.OpenAI, engine: Engine) -> None:
    chunks = list(client.completions.create(prompt=["hello", "ab"], stream=True, **GREEDY))
    texts, ends = {0: "", 1: ""}, {}
    for chunk in chunks:
        assert chunk.object == "text_completion" and chunk.usage is None
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == {0: expected(engine, "hello"), 1: expected(engine, "ab")} and ends == {0: "length", 1: "length"}


def test_chat(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.create(messages=TALK, **GREEDY)
    prompt = TOKENIZER.encode(TOKENIZER.render_chat(TALK), add_special_tokens=False)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    message = answer.choices[0].message
    assert message.role == "assistant" and message.content == expected(engine, prompt)
    assert answer.usage.prompt_tokens == len(prompt)
    parts = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    assert client.chat.completions.create(messages=parts, **GREEDY).choices[0].message.content == message.content
    named = [{"role": "developer", "content": "x"}, *TALK]
    system = [{"role": "system", "content": "x"}, *TALK]
    assert (
        client.chat.completions.create(messages=named, **GREEDY).choices[0].message.content
        == client.chat.completions.create(messages=system, **GREEDY).choices[0].message.content
    )
    limited = client.chat.completions.create(messages=TALK, max_completion_tokens=3, **GREEDY)
    assert limited.usage.completion_tokens == 3


def test_cached_tokens_are_reported(client: openai.OpenAI) -> None:
    talk = [{"role": "user", "content": "the same beginning again and again"}]
    client.chat.completions.create(messages=talk, **GREEDY)
    usage = client.chat.completions.create(messages=talk, **GREEDY).usage
    assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens


def test_continuing_the_last_message(client: openai.OpenAI, engine: Engine) -> None:
    talk = [*TALK, {"role": "assistant", "content": "I thi"}]
    answer = client.chat.completions.create(messages=talk, **greedy(continue_final_message=True))
    text = TOKENIZER.render_chat(TALK) + "I thi"
    assert answer.choices[0].message.content == expected(engine, TOKENIZER.encode(text, add_special_tokens=False))


def test_streamed_chat_has_openai_s_order(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=TALK, n=2, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=TALK, n=2, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert all(choice.delta.role is None for choice in mine[1:])
        assert mine[-1].finish_reason == "length" and mine[-1].delta.content is None
        assert all(choice.finish_reason is None for choice in mine[:-1])
        assert "".join(c.delta.content or "" for c in mine) == whole.choices[index].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_logprobs_of_completions(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.completions.create(prompt="hello", logprobs=3, **GREEDY)
    told = answer.choices[0].logprobs
    own = engine.generate(["hello"], SamplingParams(temperature=0, max_tokens=12, logprobs=3, ignore_eos=True))[
        0
    ].completions[0]
    assert told.token_logprobs == pytest.approx([entry.logprob for entry in own.logprobs])
    assert len(told.tokens) == len(told.text_offset) == len(told.top_logprobs) == 12
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs):
        assert top[token] == logprob == max(top.values())  # greedy
        assert 3 <= len(top) <= 4
    assert client.completions.create(prompt="hello", logprobs=0, **GREEDY).choices[0].logprobs.tokens == told.tokens
    streamed = client.completions.create(prompt="hello", logprobs=3, stream=True, **GREEDY)
    pieces = [chunk.choices[0].logprobs for chunk in streamed]
    assert [token for piece in pieces for token in piece.tokens] == told.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == told.text_offset


def test_logprobs_of_chats(client: openai.OpenAI) -> None:
    asked = {"logprobs": True, "top_logprobs": 2, **greedy(skip_special_tokens=False)}
    answer = client.chat.completions.create(messages=TALK, **asked)
    content = answer.choices[0].logprobs.content
    assert (
        b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == answer.choices[0].message.content
    )
    for entry in content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob == entry.logprob >= entry.top_logprobs[1].logprob
    streamed = client.chat.completions.create(messages=TALK, stream=True, **asked)
    entries = [e for chunk in streamed for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert entries == content
    assert client.chat.completions.create(messages=TALK, **GREEDY).choices[0].logprobs is None


def test_token_ids_on_request(client: openai.OpenAI) -> None:
    asked = greedy(return_token_ids=True)
    answer = client.completions.create(prompt="hello", **asked).choices[0]
    ids = answer.model_extra["token_ids"]
    assert len(ids) == 12 and TOKENIZER.decode(ids) == answer.text
    for stream in (
        client.completions.create(prompt="hello", stream=True, **asked),
        client.chat.completions.create(messages=TALK, stream=True, **asked),
    ):
        choices = [c for chunk in stream for c in chunk.choices]
        assert len([i for c in choices for i in (c.model_extra.get("token_ids") or [])]) == 12


def test_an_answer_cut_by_its_deadline(client: openai.OpenAI) -> None:
    timeout_s, answer = 0.2, None
    while answer is None:
        try:
            answer = client.completions.create(
                model="tiny", prompt="x", max_tokens=2000, extra_body={"ignore_eos": True, "timeout_s": timeout_s}
            )
        except openai.APIStatusError as error:  # not even the first token came in time
            assert error.status_code == 408 and timeout_s < 60
            timeout_s *= 1.5
    choice = answer.choices[0]
    assert choice.finish_reason == "length" and choice.model_extra["timeout"] is True
    assert 0 < answer.usage.completion_tokens < 2000


def test_sixteen_streams_at_once(server: BackgroundServer, client: openai.OpenAI) -> None:
    prompts = [f"prompt number {i}" for i in range(16)]
    alone = [client.completions.create(prompt=prompt, **GREEDY).choices[0].text for prompt in prompts]

    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(prompt=prompt, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key="none", http_client=http) as many:
            return await asyncio.gather(*(one(many, prompt) for prompt in prompts))

    assert asyncio.run(all_of_them()) == alone


def test_nothing_was_compiled_after_the_warm_up(engine: Engine, client: openai.OpenAI) -> None:
    client.completions.create(prompt="x", n=3, logprobs=5, **{**GREEDY, "temperature": 1}, top_p=0.5)
    assert engine.stats().recompilations == 0


def test_the_best_of_several(client: openai.OpenAI, engine: Engine) -> None:
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 6, "seed": 3}
    answer = client.completions.create(n=2, best_of=5, logprobs=0, extra_body={"ignore_eos": True}, **asked)
    assert answer.usage.completion_tokens == 5 * 6
    every = client.completions.create(n=5, logprobs=0, extra_body={"ignore_eos": True}, **asked)
    ranked = sorted(every.choices, key=lambda choice: -sum(choice.logprobs.token_logprobs))
    assert [choice.text for choice in answer.choices] == [choice.text for choice in ranked[:2]]


def test_priority_is_taken(client: openai.OpenAI, engine: Engine) -> None:
    # Which one goes first is the scheduler's matter; here it only has to reach it.
    seen = []
    original = engine.submit
    engine.submit = lambda *args, **kwargs: (seen.append(kwargs["priority"]), original(*args, **kwargs))[1]  # type: ignore
    try:
        client.completions.create(model="tiny", prompt="x", max_tokens=1, extra_body={"priority": -3})
    finally:
        del engine.submit
    assert seen == [-3]
