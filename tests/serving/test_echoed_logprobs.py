"""Log probabilities of prompts over HTTP, in the form that evaluation harnesses ask for: `echo` with `logprobs`."""

from typing import Any

import openai
import pytest

from jaxstack.engine import Engine, SamplingParams
from jaxstack.models.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONTEXT, GOOD = TOKENIZER.encode("some context: é"), SamplingParams(temperature=0, max_tokens=6, logprobs=1)


def harness(client: openai.OpenAI, contexts: list[list[int]], continuations: list[list[int]]) -> list[Any]:
    """Log likelihood of each continuation, and whether it is the greedy one, as lm-eval's local-completions does it:
    token ids, one generated token that is thrown away, sums over `[len(context):-1]`.
    """
    prompts = [context + continuation for context, continuation in zip(contexts, continuations)]
    answer = client.completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    found = []
    for context, choice in zip(contexts, sorted(answer.choices, key=lambda choice: choice.index)):
        values = choice.logprobs.token_logprobs[len(context) : -1]
        tops = choice.logprobs.top_logprobs[len(context) : -1]
        found.append((sum(values), all(v == max(top.values()) for v, top in zip(values, tops))))
    return found


def test_as_a_harness_asks(client: openai.OpenAI, engine: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, ignore_eos=True)
    greedy = engine.generate([CONTEXT], params)[0].completions[0]
    other = [(token + 1) % 256 for token in greedy.token_ids]
    results = harness(client, [CONTEXT, CONTEXT, [7]], [greedy.token_ids, other, [8, 9]])
    assert results[0][1] and not results[1][1]
    assert results[0][0] == pytest.approx(sum(entry.logprob for entry in greedy.logprobs), abs=1e-4)
    own = engine.generate([CONTEXT + other], SamplingParams(max_tokens=1, prompt_logprobs=1))[0].prompt_logprobs
    assert results[1][0] == pytest.approx(sum(entry.logprob for entry in own[len(CONTEXT) :]), abs=1e-6)


@pytest.mark.parametrize("prompt", ["hé<|im_end|>llo", TOKENIZER.encode("hé<|im_end|>llo")])
def test_lists_of_an_echoed_prompt(client: openai.OpenAI, engine: Engine, prompt: Any) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "temperature": 0, "echo": True, "logprobs": 2}
    ids = TOKENIZER.encode("hé<|im_end|>llo")
    answer = client.completions.create(max_tokens=0, **asked)
    (choice,) = answer.choices
    text = prompt if isinstance(prompt, str) else "héllo"
    assert choice.text == text and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 0 and answer.usage.prompt_tokens == len(ids)
    told = choice.logprobs
    assert told.tokens == ["h", r"bytes:\xc3", r"bytes:\xa9", "<|im_end|>", "l", "l", "o"]
    assert told.text_offset == [0, 1, 1, 2, 2, 3, 4]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    own = engine.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=2))[0].prompt_logprobs
    assert told.token_logprobs[1:] == pytest.approx([entry.logprob for entry in own[1:]], abs=1e-6)
    for token, top in zip(told.tokens[1:], told.top_logprobs[1:]):
        assert 2 <= len(top) <= 3 and top[token] <= max(top.values())
    # With an answer behind it, whole and streamed, for each of several choices.
    longer = client.completions.create(max_tokens=3, n=2, extra_body={"ignore_eos": True}, **asked)
    for each in longer.choices:
        lists = each.logprobs
        assert lists.tokens[:7] == told.tokens and len(lists.tokens) == len(lists.token_logprobs) == 10
        assert lists.token_logprobs[1:7] == pytest.approx(told.token_logprobs[1:], abs=1e-6)
        assert lists.text_offset[7] == len(text) and each.text.startswith(text)
    chunks = list(client.completions.create(max_tokens=3, n=2, stream=True, extra_body={"ignore_eos": True}, **asked))
    for each in longer.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == each.index]
        assert "".join(c.text for c in mine) == each.text
        for name in ("tokens", "text_offset"):
            pieces = [value for c in mine if c.logprobs for value in getattr(c.logprobs, name)]
            assert pieces == getattr(each.logprobs, name)
    only = list(client.completions.create(max_tokens=0, stream=True, **asked))
    assert "".join(c.text for chunk in only for c in chunk.choices) == text


def test_prompt_logprobs_as_a_field_of_their_own(client: openai.OpenAI, engine: Engine) -> None:
    ids = TOKENIZER.encode("hello")
    own = engine.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=3))[0].prompt_logprobs
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 2, "extra_body": {"prompt_logprobs": 3}}
    found = client.completions.create(prompt="hello", **asked).choices[0].model_extra["prompt_logprobs"]
    assert len(found) == 5 and found[0] is None
    for token, told, entry in zip(ids[1:], found[1:], own[1:]):
        assert told[str(token)]["logprob"] == pytest.approx(entry.logprob, abs=1e-6)
        assert [value["rank"] for value in told.values() if value["rank"]] and len(told) in (3, 4)
        assert told[str(token)]["decoded_token"] == chr(token)
        best = min(told.values(), key=lambda value: value["rank"] or 99)
        assert best["rank"] == 1 and best["logprob"] == max(value["logprob"] for value in told.values())
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "x"}], **asked)
    assert len(chat.model_extra["prompt_logprobs"]) == chat.usage.prompt_tokens
    plain = client.completions.create(prompt="hello", max_tokens=1, model="tiny").choices[0]
    assert "prompt_logprobs" not in plain.model_extra
