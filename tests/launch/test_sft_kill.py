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

STEPS = 96
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
        batch_rows=2, accum_steps=2, seq_len=48, max_steps={steps}, save_every=3, log_every=2, eval_every=24,
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


def being_saved(workdir: Path) -> set[str]:
    """Checkpoints that orbax is in the middle of writing, or was when it was killed."""
    folder = workdir / "checkpoints"
    return {name for name in os.listdir(folder) if "orbax-checkpoint-tmp" in name} if folder.is_dir() else set()


def wait_until(condition, process, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)


def test_five_sigkills_at_random_moments_leave_no_trace(job):
    folder, start = job
    rng = random.Random(7)
    kills = kills_while_saving = 0

    def killed(process, workdir: Path, left: set[str]) -> bool:
        """Every other time in the middle of a save, else a random while after a random step; false if it had ended."""
        nonlocal kills, kills_while_saving
        target = min(newest_step(workdir) + rng.randint(1, 9), STEPS - 1)
        saving = lambda: being_saved(workdir) - left  # noqa: E731
        if kills % 2 == 0 or kills >= 5:
            # Saves are short: one may be missed on a busy machine, but not so many that the run ends first.
            wait_until(lambda: newest_step(workdir) >= target - 3 + 12 * (not saving()), process)
        else:
            wait_until(lambda: newest_step(workdir) >= target, process)
            time.sleep(rng.random() * 0.1)
        if process.poll() is not None:
            return False
        process.send_signal(signal.SIGSTOP)
        kills, kills_while_saving = kills + 1, kills_while_saving + bool(saving())
        programs.kill(process)
        return True

    # A run that a busy machine lets end before the fifth kill must show nothing of the others; then there is one more.
    for number in range(5):
        workdir = folder / f"killed {number}"
        ended = False
        while not ended:
            left = being_saved(workdir)
            process = start(workdir.name)
            ended = (kills >= 5 and kills_while_saving > 0) or not killed(process, workdir, left)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert weights(workdir) == weights(folder / "reference")
        assert rows(workdir) == rows(folder / "reference")
        if kills >= 5 and kills_while_saving:
            return
    raise AssertionError(f"{kills} kills, {kills_while_saving} while saving, expected 5 and 1")


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
