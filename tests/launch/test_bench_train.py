"""What bench_train gives our side, and its bad usage; the contest itself needs the peers' environment."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from byte_model import byte_model, save

from jaxstack.models import lora
from launch.train_benchmark.ours import Ours, batch_of, rows_of
from launch.train_benchmark.workload import Workload, targets_of

WORKLOAD = Workload(steps=3, examples=5, seq_len=64, mean_tokens=20, vocab_size=200)


def test_a_workload_is_what_it_says():
    steps = Workload(steps=200, vocab_size=50, seq_len=512).draw()
    assert steps == Workload(steps=200, vocab_size=50, seq_len=512).draw()
    lengths = [len(ids) for step in steps for ids, _ in step]
    assert all(len(step) == 16 for step in steps) and min(lengths) >= 8 and max(lengths) <= 512
    assert np.mean(lengths) == pytest.approx(120, rel=0.05)
    ids, mask = steps[0][0]
    assert set(mask) == {0, 1} and sorted(mask) == mask and max(ids) < 50


def test_packed_and_padded_steps_train_the_same(tmp_path: Path):
    folder = tmp_path / "model"
    save(folder, byte_model(64))
    steps = WORKLOAD.draw()
    longest = max(len(ids) for step in steps for ids, _ in step)
    packed_rows = rows_of(steps, 64)
    assert packed_rows < 5
    losses = {}
    for packed, rows, row in ((True, packed_rows, 64), (False, 5, longest)):
        batches = [batch_of(step, rows, row, packed=packed) for step in steps]
        for step, batch in zip(steps, batches):
            first = (batch["positions"] == 0) & (batch["segment_ids"] > 0)
            assert (batch["loss_mask"] * ~first).sum() == targets_of(step)
            assert (batch["segment_ids"] > 0).sum() == sum(len(ids) for ids, _ in step)
        config = lora.LoraConfig(r=4, alpha=8.0)
        ours = Ours(folder, config, 0, batches, longest, learning_rate=1e-2, clip_norm=1.0, total_steps=100)
        losses[packed] = ours.run(0, 6)[0]
    np.testing.assert_allclose(losses[True], losses[False], rtol=1e-5)
    assert losses[True][3] < losses[True][0]


def test_without_the_peers_it_says_how_to_get_them(tmp_path: Path):
    flags = ["--peer_python=/nowhere/python", f"--workdir={tmp_path / 'new'}"]
    run = subprocess.run([sys.executable, "-m", "launch.bench_train", *flags], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "make peers" in run.stderr and not (tmp_path / "new").exists()
