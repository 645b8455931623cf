"""What one request holds of its answers: pieces as they come or all at the end, and none lost when they are ended."""

import asyncio

import pytest

from jaxstack.engine import Engine, SamplingParams
from jaxstack.serving.generation import Generation, Piece

LONG = SamplingParams(max_tokens=1500, temperature=0.0, ignore_eos=True)


async def ended_midway(engine: Engine, prompts: list[list[int]], whole: bool) -> tuple[list[Piece], Generation]:
    before = engine.stats().generation_tokens
    async with Generation(engine, prompts, LONG, whole=whole) as generation:
        while engine.stats().generation_tokens < before + 40:
            await asyncio.sleep(0.005)
        await generation.abort()
        pieces = await generation.take()
        assert generation.finished
    return pieces, generation


@pytest.mark.parametrize("whole", [False, True])
def test_what_an_aborted_answer_has_stays(engine: Engine, whole: bool) -> None:
    prompts = [[65, 66, 67], [70, 71]]
    pieces, generation = asyncio.run(ended_midway(engine, prompts, whole))
    assert [piece.choice for piece in pieces] == [0, 1]
    for prompt, piece in zip(prompts, pieces):
        assert piece.finish_reason == "abort" and not piece.timed_out
        told = len(piece.token_ids)
        assert told >= 10
        (output,) = engine.generate([prompt], SamplingParams(max_tokens=told, temperature=0.0, ignore_eos=True))
        assert piece.token_ids == output.completions[0].token_ids
    assert generation.usage.completion_tokens == sum(len(piece.token_ids) for piece in pieces)


def test_a_whole_answer_wakes_its_reader_when_it_has_ended(engine: Engine) -> None:
    asked = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)

    async def answer(whole: bool) -> tuple[list[int], int]:
        """The tokens, and how many were still to be made when the first came."""
        tokens: list[int] = []
        missing = None
        before = engine.stats().generation_tokens
        async for delta in engine.stream([65, 66], asked, whole=whole):
            if missing is None:
                missing = before + 30 - engine.stats().generation_tokens
            tokens += delta.token_ids
        assert missing is not None
        return tokens, missing

    (whole, none), (parts, _) = asyncio.run(answer(True)), asyncio.run(answer(False))
    assert whole == parts and len(whole) == 30 and none == 0
