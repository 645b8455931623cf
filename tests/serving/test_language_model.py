"""The two language models give the same answers for the same model, and the same errors for the same mistakes."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from jaxstack.engine import Completion, Engine, SamplingParams
from jaxstack.runtime.errors import UserError
from jaxstack.serving import BackgroundServer, EndpointModel, EngineModel, LanguageModel

PROMPTS: list[Any] = ["ab", "a longer raw prompt", [{"role": "user", "content": "hé"}], "ab"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


@pytest.fixture(scope="module")
def models(engine: Engine, server: BackgroundServer) -> Iterator[tuple[LanguageModel, LanguageModel]]:
    with EndpointModel(server.base_url) as endpoint:
        yield EngineModel(engine), endpoint


def essence(completion: Completion) -> tuple[Any, ...]:
    return completion.text, list(completion.token_ids), completion.finish_reason, completion.stop_reason


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(temperature=0.0, max_tokens=40, stop=("\x05", "a"), ignore_eos=True, n=2),
        SamplingParams(temperature=1.0, seed=7, top_k=20, top_p=0.9, max_tokens=10),
        SamplingParams(temperature=0.0, max_tokens=None, stop_token_ids=(5, 6, 7, 8, 9, 10)),
        [SamplingParams(temperature=0.0, max_tokens=i) for i in (1, 2, 3, 4)],
    ],
)
def test_equal_answers(models: tuple[LanguageModel, LanguageModel], sampling: Any) -> None:
    own, remote = (model.generate(PROMPTS, sampling) for model in models)
    assert len(own) == len(remote) == len(PROMPTS)
    for a, b in zip(own, remote):
        assert [essence(c) for c in a.completions] == [essence(c) for c in b.completions]
        assert a.prompt_tokens == b.prompt_tokens and a.text == b.text
        assert a.completion_tokens == b.completion_tokens > 0


def test_equal_streams(models: tuple[LanguageModel, LanguageModel]) -> None:
    async def read(model: LanguageModel, prompt: Any) -> Completion:
        whole = Completion(0)
        async for delta in model.stream(prompt, GREEDY):
            whole.add(delta)
        return whole

    for prompt in PROMPTS:
        own, remote = (asyncio.run(read(model, prompt)) for model in models)
        assert essence(own) == essence(remote) == essence(models[0].generate([prompt], GREEDY)[0].completions[0])


def test_chat_arguments_reach_the_template(models: tuple[LanguageModel, LanguageModel]) -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I th"}]
    go_on = {"add_generation_prompt": False, "continue_final_message": True}
    for model in models:
        raw = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\nI th"
        assert model.generate([talk], GREEDY, chat_kwargs=go_on)[0].text == model.generate([raw], GREEDY)[0].text
        assert model.generate([talk], GREEDY, chat_kwargs={"unused": 1})[0].text != ""


def test_equal_mistakes(models: tuple[LanguageModel, LanguageModel]) -> None:
    for model in models:
        with pytest.raises(UserError, match="found no tokens"):
            model.generate(["x", ""], GREEDY)
        with pytest.raises(UserError, match="expected at most 2048 together"):
            model.generate(["x" * 3000], GREEDY)
        with pytest.raises(UserError, match="expected one for each of 2 prompts"):
            model.generate(["x", "y"], [GREEDY])


def test_closing_a_stream_ends_the_request(models: tuple[LanguageModel, LanguageModel], engine: Engine) -> None:
    async def read_a_little(model: LanguageModel) -> None:
        stream: Any = model.stream("x", SamplingParams(max_tokens=2000, ignore_eos=True))
        await anext(stream)
        await stream.aclose()
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.01)

    for model in models:
        before = engine.stats().finished.get("abort", 0)
        asyncio.run(read_a_little(model))
        assert engine.stats().finished["abort"] == before + 1


def test_what_an_endpoint_cannot_do_is_said(server: BackgroundServer) -> None:
    with EndpointModel(server.base_url, extended=False) as plain:
        assert plain.generate(["ab"], GREEDY)[0].completions[0].token_ids == []
        with pytest.raises(UserError, match="top_k"):
            plain.generate(["ab"], SamplingParams(top_k=5))
        with pytest.raises(UserError, match="max_tokens"):
            plain.generate(["ab"], SamplingParams(max_tokens=None))
        with pytest.raises(UserError, match="logprobs"):
            plain.generate(["ab"], SamplingParams(logprobs=1))
    with EndpointModel(server.base_url, model="other") as wrong, pytest.raises(UserError, match=r"404.*does not exist"):
        wrong.generate(["ab"], GREEDY)
    with (
        EndpointModel("http://127.0.0.1:9/v1", max_retries=0) as nobody,
        pytest.raises(UserError, match="cannot be reached"),
    ):
        nobody.generate(["ab"], GREEDY)
