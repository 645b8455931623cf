"""Whole runs in this process: what a workdir holds afterwards, stopping and resuming, and every mistake's one line."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from tiny_decoder import CONFIG, examples

from jaxstack.models import dense_attention
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.tokenizer import byte_tokenizer
from jaxstack.runtime.checkpoint import Checkpointer, Keep
from jaxstack.runtime.errors import UserError
from jaxstack.training import DataConfig, LoraConfig, OptimizerConfig, ResumeConfig, SftConfig, load_adapters, train_sft
from jaxstack.training.losses import LossParts, cross_entropy

QWEN2 = Path(__file__).parents[1] / "golden" / "decoder" / "qwen2"
ROWS = examples(40, seed=1)


def config(**fields) -> SftConfig:
    defaults = {
        "model": CONFIG,
        "batch_rows": 2,
        "accum_steps": 2,
        "seq_len": 32,
        "max_steps": 12,
        "log_every": 4,
        "save_every": 5,
        "optimizer": OptimizerConfig(learning_rate=5e-3, schedule="constant"),
    }
    return SftConfig(**{**defaults, **fields})


def train(workdir, examples=ROWS, **fields):
    return train_sft(config(**fields), workdir, examples=examples, progress=False)


def weights(folder) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(Path(folder) / "model" / "model.safetensors")


def assert_same_weights(a, b) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def rows(workdir) -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(workdir)


def test_a_run_leaves_a_model_and_its_records(finished):
    workdir, result = finished
    assert result.steps == 12 and result.model_folder == workdir / "model" and result.adapter_folder is None
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert summary["recompilations"] == 0 and summary["skipped_steps"] == 0 and summary["stopped_by"] is None
    assert summary["data"]["examples"] == 40 and 0.8 < summary["fill_rate"] <= 1
    log = rows(workdir)
    assert [row["step"] for row in log] == [4, 8, 12]
    assert log[-1]["loss"] == result.final_loss < log[0]["loss"]
    assert log[-1]["tokens_trained"] == result.tokens_trained > 500
    assert log[-1]["learning_rate"] == pytest.approx(5e-3) and log[0]["epoch"] > 0
    for field in ("tokens_per_s", "step_time_s", "data_wait_s", "memory_bytes", "grad_norm", "update_norm_ratio"):
        assert log[0][field] >= 0
    assert (workdir / "loss.png").stat().st_size > 1000 and list((workdir / "tensorboard").iterdir())
    model = load_decoder(workdir / "model", progress=False)
    assert model.config.eos_token_ids == (2,)


def test_a_finished_run_started_again_changes_nothing(finished):
    workdir, result = finished
    before = weights(workdir)
    again = train(workdir)
    assert again.steps == 12 and again.final_loss == result.final_loss and len(rows(workdir)) == 3
    for name, value in weights(workdir).items():
        np.testing.assert_array_equal(value, before[name])


def test_stopped_from_another_thread_and_resumed_it_ends_the_same(finished, tmp_path):
    stop = threading.Event()
    results = []

    def work():
        results.append(train_sft(config(), tmp_path, examples=ROWS, stop=stop))

    # Before the first step there is nothing to save.
    stop.set()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results[0].steps == 0 and results[0].model_folder is None and results[0].summary["stopped_by"] == "requested"
    assert not any(name.isdigit() for name in os.listdir(tmp_path / "checkpoints"))
    stop.clear()

    def watch():
        while not saved(tmp_path):
            time.sleep(0.002)
        stop.set()

    watcher = threading.Thread(target=watch)
    thread = threading.Thread(target=work)
    watcher.start()
    thread.start()
    thread.join()
    watcher.join()
    assert 0 < results[1].steps <= 12
    stop.clear()
    work()
    assert results[2].steps == 12
    assert_same_weights(tmp_path, finished[0])


def saved(workdir) -> bool:
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(name.isdigit() for name in os.listdir(folder))


def test_every_step_saved_is_the_state_of_that_step_in_spite_of_donation(finished, tmp_path):
    train(tmp_path / "all", save_every=1, keep=Keep(last=100))
    checkpoints = Checkpointer(tmp_path / "all" / "checkpoints")
    assert checkpoints.steps() == list(range(1, 13))
    checkpoints.close()
    for steps in (3, 7):
        train(tmp_path / str(steps), max_steps=steps)
        (tmp_path / "all" / "checkpoints" / str(steps)).rename(tmp_path / f"only_{steps}")
        (tmp_path / f"again_{steps}" / "checkpoints").mkdir(parents=True)
        (tmp_path / f"only_{steps}").rename(tmp_path / f"again_{steps}" / "checkpoints" / str(steps))
        train(tmp_path / f"again_{steps}", max_steps=steps)
        assert_same_weights(tmp_path / f"again_{steps}", tmp_path / str(steps))
    assert_same_weights(tmp_path / "all", finished[0])


def test_an_unreadable_newest_checkpoint_is_set_aside_with_a_warning(finished, tmp_path, caplog):
    train(tmp_path, max_steps=10)
    spoiled = 0
    for path in (tmp_path / "checkpoints" / "10" / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            spoiled += 1
    assert spoiled
    with caplog.at_level(logging.WARNING):
        train(tmp_path)
    assert "checkpoint 10 cannot be read" in caplog.text and "step 5 is used" in caplog.text
    assert (tmp_path / "checkpoints.corrupt" / "10").is_dir()
    assert_same_weights(tmp_path, finished[0])
    assert [row["step"] for row in rows(tmp_path)] == [4, 8, 12]
    for step in (5, 10, 12):
        for path in (tmp_path / "checkpoints" / str(step) / "arrays").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 checkpoints can be read"):
        train(tmp_path)


def test_resuming_another_configuration_is_refused_with_the_differing_fields(finished):
    workdir, _ = finished
    with pytest.raises(UserError, match=r"\(batch_rows: 2 -> 3; optimizer\.b2: 0\.95 -> 0\.9\); expected the same"):
        train(workdir, batch_rows=3, optimizer=OptimizerConfig(learning_rate=5e-3, schedule="constant", b2=0.9))
    with pytest.raises(UserError, match=r"\(data: content differs\)"):
        train(workdir, examples=ROWS[:-1])
    with pytest.raises(UserError, match=r"resume\.enabled=false"):
        train(workdir, resume=ResumeConfig(enabled=False))
    # What may change: logging, saving, and the length of the run.
    assert train(workdir, log_every=3, save_every=7, keep=Keep(last=3)).steps == 12


def test_lora_trains_the_adapter_only_and_exports_it_and_the_merged_model(tmp_path):
    items = examples(30, seed=2, vocab=97)
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(
        "".join(
            json.dumps({"token_ids": e.token_ids.tolist(), "loss_mask": e.loss_mask.astype(int).tolist()}) + "\n"
            for e in items[:7]
        )
    )
    result = train(
        tmp_path,
        items,
        model=str(QWEN2),
        lora=LoraConfig(r=2, targets=("q_proj", "down_proj")),
        data=DataConfig(eval_paths=(str(heldout),)),
        optimizer=OptimizerConfig(learning_rate=3e-2),
        eval_every=6,
        epochs=2.0,
        max_steps=None,
        compute_dtype="float32",
    )
    assert result.summary["recompilations"] == 0
    assert result.summary["trainable_parameters"] == 3 * 2 * 2 * (
        (32 + 32) + (48 + 32)
    )  # layers, slots, rank, in + out
    evaluations = [row for row in rows(tmp_path) if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == sorted({6, 12, result.steps} & set(range(result.steps + 1)))
    base, merged, adapted = (load_decoder(f, progress=False) for f in (QWEN2, tmp_path / "model", QWEN2))
    load_adapters(adapted, [tmp_path / "adapter"])
    base, merged_params = (
        {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(m))} for m in (base, merged)
    )
    changed = {k for k in base if not np.array_equal(base[k], merged_params[k])}
    assert changed == {"layers.self_attn.q_proj.kernel", "layers.mlp.down_proj.kernel"}
    # The held-out loss, computed by the exported folders themselves, one document at a time.
    for model in (merged, adapted):
        graphdef, state = nnx.split(model)
        forward = jax.jit(lambda s, t, g=graphdef: nnx.merge(g, s)(t, jnp.arange(20), dense_attention())[0])
        num = den = 0.0
        for e in items[:7]:
            logits = forward(state, jnp.asarray(np.pad(e.token_ids, (0, 20 - len(e.token_ids)))))
            nll = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(e.token_ids) - 1), e.token_ids[1:]]
            num, den = num + float((nll * e.loss_mask[1:]).sum()), den + int(e.loss_mask[1:].sum())
        assert num / den == pytest.approx(evaluations[-1]["eval_loss"], rel=1e-5)


def test_ten_steps_without_a_finite_gradient_end_the_run_with_a_checkpoint(tmp_path):
    def broken(logits, targets):
        parts = cross_entropy(logits, targets)
        return LossParts(parts.num * jnp.nan, parts.den, parts.aux)

    with pytest.raises(UserError, match=r"10 steps in a row up to step \d+ had a gradient that is not finite"):
        train_sft(config(max_steps=50), tmp_path, examples=ROWS, loss_fn=broken, progress=False)
    assert saved(tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_tokenizer_folder_travels_with_the_model(tmp_path):
    byte_tokenizer().save(tmp_path / "tokenizer")
    model = dataclasses.replace(CONFIG, vocab_size=261, eos_token_ids=(260,), layer_windows=(), num_layers=1)
    talk = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 3
    result = train(tmp_path / "run", talk, model=model, tokenizer=str(tmp_path / "tokenizer"), max_steps=2, seq_len=64)
    from jaxstack.models.tokenizer import load_tokenizer

    assert load_tokenizer(result.model_folder).has_chat_template
    assert result.tokens_trained > 0


BAD = [
    ({"batch_rows": 0}, "batch_rows=0: expected an integer of at least 1"),
    ({"accum_steps": 1.5}, "accum_steps=1.5"),
    ({"seq_len": 1}, "seq_len=1: expected an integer of at least 2"),
    ({"seq_len": 256}, "seq_len=256: expected at most the model's max_position_embeddings=128"),
    ({"max_steps": None}, "max_steps and epochs are both none"),
    ({"max_steps": 0}, "max_steps=0"),
    ({"epochs": -1.0}, "epochs=-1.0: expected a positive number"),
    ({"remat": "some"}, "remat='some': expected one of none, dots, full"),
    ({"param_dtype": "float16"}, "param_dtype='float16'"),
    ({"param_dtype": "bfloat16"}, "without lora: most updates would round to nothing"),
    ({"compute_dtype": "int8"}, "compute_dtype='int8'"),
    ({"model": 3}, "model=3: expected a folder or a DecoderConfig"),
    ({"model": "no/such/folder"}, "model: no such folder 'no/such/folder'"),
    ({"tokenizer": "no/such/folder"}, "no such model folder"),
    ({"lora": LoraConfig(targets=("nothing",))}, "'nothing' matches no module"),
    ({"optimizer": OptimizerConfig(warmup_steps=99)}, "99 warm-up steps do not fit into 12 steps"),
    ({"data": DataConfig(eval_paths=("no.jsonl",))}, "data file 'no.jsonl': No such file"),
    ({"examples": []}, "the data set is empty"),
    ({"examples": [{"token_ids": [1, 99]}]}, r"examples\[0\]: token id 99 is not below the model's vocabulary size 61"),
    ({"examples": None}, "data.paths is empty and no examples were given"),
    ({"examples": [{"messages": []}]}, r"examples\[0\]: found the fields 'messages'; without a tokenizer"),
]


@pytest.mark.parametrize("fields,message", BAD)
def test_mistakes_get_one_line(tmp_path, fields, message):
    with pytest.raises(UserError, match=message) as error:
        train(tmp_path, **fields)
    assert "\n" not in str(error.value)


def test_a_tokenizer_larger_than_the_model(tmp_path):
    byte_tokenizer().save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="has ids up to 260, expected below the model's vocab_size=61"):
        train(tmp_path / "run", tokenizer=str(tmp_path / "tokenizer"))


def test_a_workdir_in_use_names_the_holder(tmp_path):
    code = (
        "import sys, time\nfrom jaxstack.runtime.signals import WorkdirLock\n"
        "with WorkdirLock(sys.argv[1]):\n    print('locked', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"in use by another job \(pid {holder.pid}\)"):
            train(tmp_path)
    finally:
        holder.kill()
        holder.communicate()


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train(tmp_path / "file" / "run")
