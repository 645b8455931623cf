"""`python -m launch.sft`, killed again and again: the run must not show it."""

import hashlib
import json
import os
import random
import signal
import time
from pathlib import Path

import programs
import pytest

STEPS = 160
CONFIG = """
from jaxstack.models import DecoderConfig
from jaxstack.training import DataConfig, OptimizerConfig, SftConfig

def get_config():
    model = DecoderConfig(
        architecture="LlamaForCausalLM", vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2,
        num_kv_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True, eos_token_ids=(1,),
        initializer_range=0.1,
    )
    return SftConfig(
        model=model,
        data=DataConfig(paths=(r"{data}",), eval_paths=(r"{data}",)),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        batch_rows=2, accum_steps=2, seq_len=48, max_steps={steps}, save_every=3, log_every=2, eval_every=40,
    )
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Command lines of one job, and the folder of its reference run, which nothing interrupted."""
    folder = tmp_path_factory.mktemp("sft_kill")
    rng = random.Random(0)
    rows = []
    for _ in range(60):
        length = rng.randint(4, 30)
        ids = [(3 + 7 * i + rng.randint(0, 3)) % 64 for i in range(length)]
        rows.append({"token_ids": ids, "loss_mask": [int(i > 2) for i in range(length)]})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.py").write_text(CONFIG.format(data=folder / "data.jsonl", steps=STEPS))

    def start(workdir: str, **how: bool):
        flags = [f"--config={folder / 'config.py'}", f"--compilation_cache={folder / 'compiled'}"]
        return programs.start("launch.sft", *flags, f"--workdir={folder / workdir}", **how)

    reference = start("reference", anew=True)
    out, err = reference.communicate(timeout=300)
    assert reference.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["steps"] == STEPS and summary["recompilations"] == 0
    return folder, start


def weights(workdir: Path) -> str:
    return hashlib.sha256((workdir / "model" / "model.safetensors").read_bytes()).hexdigest()


def rows(workdir: Path) -> list[dict]:
    timings = ("tokens_per_s", "step_time_s", "data_wait_s", "memory_bytes")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timings} for line in lines]


def newest_step(workdir: Path) -> int:
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def saving(workdir: Path) -> bool:
    """Whether orbax is in the middle of writing a checkpoint."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any("orbax-checkpoint-tmp" in name for name in os.listdir(folder))


def wait_until(condition, process, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_five_sigkills_at_random_moments_leave_no_trace(job):
    folder, start = job
    workdir = folder / "killed"
    rng = random.Random(7)
    kills = kills_while_saving = 0
    for attempt in range(30):
        process = start("killed")
        begin = newest_step(workdir)
        target = min(begin + rng.randint(1, 9), STEPS - 1)
        if kills < 5:
            # Every other time in the middle of a save, else a random while after a random step. Saves are short: one
            # may be missed on a busy machine, but not so many that the run ends first.
            if attempt % 2 == 0:
                wait_until(
                    lambda t=target: newest_step(workdir) >= t - 3 + 12 * (not saving(workdir)), process
                )  # fmt: skip
            else:
                wait_until(lambda t=target: newest_step(workdir) >= t, process)
                time.sleep(rng.random() * 0.1)
            if process.poll() is None:
                kills_while_saving += saving(workdir)
                programs.kill(process)
                kills += 1
                continue
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        if newest_step(workdir) == STEPS:
            break
    assert kills >= 5 and kills_while_saving >= 1
    assert weights(workdir) == weights(folder / "reference")
    assert rows(workdir) == rows(folder / "reference")


def test_sigterm_saves_and_exits_0_and_the_restarted_run_shows_no_trace(job):
    folder, start = job
    workdir = folder / "terminated"
    process = start("terminated")
    wait_until(lambda: newest_step(workdir) >= 3, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    summary = json.loads(out.splitlines()[-1])
    assert summary["stopped_by"] == "SIGTERM" and summary["model_folder"] is None
    assert 3 <= summary["steps"] == newest_step(workdir) < STEPS
    process = start("terminated")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"resumed at step {summary['steps']}" in err
    assert weights(workdir) == weights(folder / "reference")
    assert rows(workdir) == rows(folder / "reference")
