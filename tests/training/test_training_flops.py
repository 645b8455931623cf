"""Model FLOPs against the model itself: its matrices counted, its masks summed."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny_decoder import CONFIG, decoder, examples

from jaxstack.models import MoeConfig
from jaxstack.runtime.metrics import read_rows
from jaxstack.training import SftConfig, train_sft
from jaxstack.training import sft as sft_module
from jaxstack.training.flops import active_parameters, mean_keys, peak_flops, training_flops_per_token
from jaxstack.training.step import nnx, split_model


def test_active_parameters_are_the_matrices_of_a_token():
    def count(config, experts_used=1.0):
        total = 0.0
        for name, value in split_model(decoder(config), nnx.Param)[1].items():
            if name.endswith("kernel") or (config.tie_word_embeddings and name == "embed.embedding"):
                routed = "moe" in name and "router" not in name
                total += value.size * (experts_used if routed else 1)
        return total

    assert active_parameters(CONFIG) == count(CONFIG)
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    assert active_parameters(tied) == count(tied)
    moe = MoeConfig(num_experts=4, experts_per_token=2, intermediate_size=16, dense_layers=(1,))
    sparse = dataclasses.replace(CONFIG, moe=moe)
    assert active_parameters(sparse) == count(sparse, experts_used=2 / 4)


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_mean_keys_are_those_of_the_mask(window):
    lengths = np.array([1, 2, 7, 20])
    seen = []
    for length in lengths:
        query, key = np.arange(length)[:, None], np.arange(length)
        seen += ((key <= query) & (key > query - (window or length))).sum(axis=1).tolist()
    assert mean_keys(lengths, window) == pytest.approx(np.mean(seen), rel=1e-12)


def test_flops_of_a_forward_and_a_backward_pass():
    lengths = np.full(3, 9)
    attention = sum(3 * 2 * 2 * CONFIG.num_heads * CONFIG.head_dim * mean_keys(lengths, w) for w in (6, None))
    matrices = active_parameters(CONFIG)
    assert training_flops_per_token(CONFIG, lengths) == 6 * matrices + attention
    assert training_flops_per_token(CONFIG, lengths, adapter_parameters=10) == 4 * matrices + 60 + attention


def test_peaks():
    kinds = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12, "TPU v5 lite": 197e12, "TPU v5p": 459e12}
    for kind, peak in kinds.items():
        assert peak_flops(SimpleNamespace(device_kind=kind, platform="gpu")) == peak
    assert peak_flops(SimpleNamespace(device_kind="Something new", platform="gpu")) is None
    assert peak_flops(jax.devices("cpu")[0]) is None


def test_mfu_is_in_the_log_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(sft_module, "peak_flops", lambda device: 1e12)
    config = SftConfig(model=CONFIG, batch_rows=2, accum_steps=2, seq_len=32, max_steps=4, log_every=2)
    items = examples(40, seed=1)
    train_sft(config, tmp_path, examples=items, progress=False)
    rows = read_rows(tmp_path / "metrics.jsonl")
    work = training_flops_per_token(CONFIG, np.array([len(e.token_ids) for e in items]))
    for before, row in zip([{"tokens_seen": 0}, *rows], rows):
        tokens_per_s = (row["tokens_seen"] - before["tokens_seen"]) / (2 * row["step_time_s"])
        assert row["mfu"] == pytest.approx(tokens_per_s * work / 1e12, rel=1e-6)
