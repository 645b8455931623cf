"""What bench_train gives our side, and its bad usage; the contest itself needs the peers' environment."""

from pathlib import Path

import numpy as np
import programs
import pytest
from byte_model import byte_model, save

from jaxstack.models import lora
from jaxstack.training.packing import fill_rows
from launch.train_benchmark.ours import Ours
from launch.train_benchmark.workload import Workload, targets_of


def test_a_workload_is_what_it_says():
    workload = Workload(steps=40, rows=4, vocab_size=50, seq_len=512)
    steps = workload.draw()
    examples = steps.plain()
    assert examples == workload.draw().plain()
    lengths = [len(ids) for step in examples for ids, _ in step]
    assert len(examples) == 40 and min(lengths) >= 8 and max(lengths) == steps.longest <= 512
    assert np.mean(lengths) == pytest.approx(120, rel=0.05)
    assert 0.95 < steps.fill_rate <= 1.0
    ids, mask = examples[0][0]
    assert set(mask) == {0, 1} and sorted(mask) == mask and max(ids) < 50


def test_both_sides_get_the_same_steps():
    steps = Workload(steps=3, rows=2, seq_len=64, mean_tokens=20, vocab_size=200).draw()
    for batches, count in ((steps.packed(), None), (steps.padded(4), 4)):
        for step, batch in zip(steps.plain(count), batches, strict=True):
            assert count is None or batch["token_ids"].shape[0] == len(step) == count
            found = []
            for row in range(len(batch["token_ids"])):
                for segment in range(1, batch["segment_ids"][row].max() + 1):
                    here = batch["segment_ids"][row] == segment
                    found.append((batch["token_ids"][row][here].tolist(), batch["loss_mask"][row][here].tolist()))
            assert sorted(found) == sorted(step)
            assert targets_of(batch) == sum(sum(mask[1:]) for _, mask in step)


def test_packed_and_padded_steps_train_the_same(tmp_path: Path):
    folder = tmp_path / "model"
    save(folder, byte_model(64))
    steps = Workload(steps=3, rows=2, seq_len=64, mean_tokens=20, vocab_size=200).draw()
    fewest = min(map(len, steps.examples))
    alike = [fill_rows(steps.dataset, [step[:fewest]], 1, 512) for step in steps.examples]  # one long row
    losses = []
    for batches in (steps.padded(fewest), alike):
        config = lora.LoraConfig(r=4, alpha=8.0)
        ours = Ours(folder, config, 0, batches, steps.longest, learning_rate=1e-2, clip_norm=1.0, total_steps=100)
        losses.append(ours.run(0, 6)[0])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][3] < losses[0][0]


def test_without_the_peers_it_says_how_to_get_them(tmp_path: Path):
    flags = ["--peer_python=/nowhere/python", f"--workdir={tmp_path / 'new'}"]
    run = programs.run("launch.bench_train", *flags)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "make peers" in run.stderr and not (tmp_path / "new").exists()
