"""A model that writes while it is trained: what it writes is what its saved form writes."""

import dataclasses

import numpy as np
import pytest
from tiny_decoder import CONFIG, examples

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models.checkpoint import load_decoder
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import read_rows
from jaxstack.training import GenerationEval, LoraConfig, OptimizerConfig, SftConfig, train_sft

ROWS = examples(30, seed=4)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
SAMPLING = SamplingParams(temperature=0.7, max_tokens=8, ignore_eos=True)
# Few steps to compile.
SETTINGS = EngineConfig(max_sequences=3, max_batch_tokens=16, max_model_len=16, num_pages=6)


def run(workdir, heard, *, stop_after=None, **fields):
    def score(outputs):
        assert [o.prompt_token_ids for o in outputs] == PROMPTS
        heard.append([o.completions[0].token_ids for o in outputs])
        return {"first": outputs[0].completions[0].token_ids[0], "tokens": 8}

    config = SftConfig(
        model=CONFIG,
        batch_rows=4,
        seq_len=32,
        max_steps=stop_after or 6,
        log_every=3,
        eval_every=2,
        optimizer=OptimizerConfig(learning_rate=2e-2, schedule="constant"),
        **fields,
    )
    wanted = GenerationEval(PROMPTS, score, SAMPLING, SETTINGS)
    return train_sft(config, workdir, examples=ROWS, generation=wanted, progress=False)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4)], ids=["full", "lora"])
def test_current_weights_answer_and_nothing_is_compiled_for_it(tmp_path, lora):
    heard = []
    result = run(tmp_path, heard, lora=lora)
    assert result.summary["recompilations"] == 0 and len(heard) == 3
    assert heard[0] != heard[-1]
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "score_first" in row]
    assert [row["step"] for row in rows] == [2, 4, 6] and all(row["score_tokens"] == 8 for row in rows)
    assert [row["score_first"] for row in rows] == [answers[0][0] for answers in heard]
    assert result.summary["scores"] == {"score_first": heard[-1][0][0], "score_tokens": 8.0}
    # The exported folder, in an engine of its own, writes the same as the weights it was made from.
    engine = Engine(load_decoder(result.model_folder, progress=False), None, SETTINGS)
    seeds = [dataclasses.replace(SAMPLING, seed=number) for number in range(3)]
    assert [o.completions[0].token_ids for o in engine.generate(PROMPTS, seeds)] == heard[-1]
    engine.close()


def test_a_resumed_run_scores_what_one_run_would(tmp_path):
    once, twice = [], []
    run(tmp_path / "once", once)
    run(tmp_path / "twice", twice, stop_after=2)
    run(tmp_path / "twice", twice)
    np.testing.assert_array_equal(once, twice)


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="expected at least one prompt"):
        GenerationEval([], lambda outputs: {})
    with pytest.raises(UserError, match="expected at least one prompt in a sequence"):
        GenerationEval("one text", lambda outputs: {})
    config = SftConfig(model=CONFIG, batch_rows=4, seq_len=32, max_steps=2)
    for prompt, message in (([1, 61], "61"), ("text", "no tokenizer")):
        with pytest.raises(UserError, match=message):
            wanted = GenerationEval([prompt], lambda outputs: {}, SAMPLING)
            train_sft(config, tmp_path, examples=ROWS, generation=wanted, progress=False)
