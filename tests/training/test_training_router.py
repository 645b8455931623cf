"""The load-balancing loss of a mixture of experts in the training step."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_decoder import CONFIG, batch, decoder, examples

from jaxstack.models import MoeConfig
from jaxstack.models.moe import load_balancing_loss
from jaxstack.runtime.errors import UserError
from jaxstack.training import DataConfig, OptimizerConfig, SftConfig, train_sft
from jaxstack.training.losses import cross_entropy
from jaxstack.training.packed_attention import packed_attention
from jaxstack.training.step import decoder_loss, loss_gradients, split_model

SPARSE = dataclasses.replace(
    CONFIG,
    architecture="Qwen3MoeForCausalLM",
    layer_windows=(),
    moe=MoeConfig(num_experts=4, experts_per_token=2, intermediate_size=16),
)


@functools.cache
def split():
    return split_model(decoder(SPARSE), nnx.Param)[:2]


def data():
    return batch(examples(5, seed=2), [[0, 3], [1], [2, 4], []], 40)


def balance(params, batch):
    """By itself, of the tokens that are not padding."""
    flat = {k: v.reshape(-1) for k, v in batch.items()}
    attend, real = packed_attention(batch["positions"]), flat["segment_ids"] != 0
    model = split()[0].merge(params)
    sums = model.hidden_and_routing(flat["token_ids"], flat["positions"], attend, None, real)[2]
    return load_balancing_loss(sums), sums.tokens


@functools.cache
def evaluate():
    """The loss without the term, and with half of it."""
    losses = [decoder_loss(cross_entropy, router_aux_loss_coef=coef) for coef in (0.0, 0.5)]
    return jax.jit(lambda params, batch: [loss(split()[0].merge(params), batch) for loss in losses])


def test_it_is_added_with_its_coefficient_and_padding_does_not_count():
    params = split()[1]
    run = jax.jit(jax.value_and_grad(balance, has_aux=True))
    (value, tokens), slope = run(params, data())
    assert float(tokens) == 2 * float((data()["segment_ids"] != 0).sum()) and 2 < float(value) < 4
    plain, parts = evaluate()(params, data())
    assert float(parts.den) == float(plain.den)
    assert float(parts.num - plain.num) == pytest.approx(0.5 * float(value * parts.den), rel=1e-4)
    for found in (plain, parts):
        assert float(found.aux["router_aux_loss"][0] / parts.den) == pytest.approx(float(value), rel=1e-5)
    moved = {k: v - 0.05 * slope[k] for k, v in params.items()}
    assert float(run(moved, data())[0][0]) < float(value)
    assert np.asarray(slope["layers.moe.router.kernel"]).any()


def test_microbatches_weigh_by_their_targets():
    structure, params = split()
    loss = decoder_loss(cross_entropy, router_aux_loss_coef=0.5)
    parts, grads = jax.jit(lambda p, b: loss_gradients(structure, loss, p, {}, b, 2))(params, data())
    halves = [{k: jnp.pad(v[i : i + 2], ((0, 2), (0, 0))) for k, v in data().items()} for i in (0, 2)]
    found = [evaluate()(params, half)[1] for half in halves]
    assert float(parts.num) == pytest.approx(sum(float(h.num) for h in found), rel=1e-5)
    assert float(parts.den) == sum(float(h.den) for h in found)
    assert all(np.isfinite(np.asarray(g)).all() for g in grads.values())


def test_fine_tuning_trains_with_it_and_evaluates_without(tmp_path):
    rows = [{"token_ids": e.token_ids.tolist(), "loss_mask": e.loss_mask.astype(int).tolist()} for e in examples(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = (str(tmp_path / "rows.jsonl"),)
    config = SftConfig(
        model=SPARSE,
        data=DataConfig(paths=path, eval_paths=path),
        optimizer=OptimizerConfig(learning_rate=1e-12, schedule="constant"),
        batch_rows=4,
        seq_len=48,
        max_steps=2,
        log_every=1,
        eval_every=1,
        router_aux_loss_coef=0.5,
    )
    result = train_sft(config, tmp_path / "run", progress=False)
    assert result.summary["recompilations"] == 0
    found = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        found |= json.loads(line)
    # The same rows, and no learning: the two losses differ by the term alone.
    assert found["eval_router_aux_loss"] == pytest.approx(found["router_aux_loss"], rel=1e-5) and found["eval_loss"] > 1
    assert found["loss"] - found["eval_loss"] == pytest.approx(0.5 * found["router_aux_loss"], rel=1e-4)


def test_a_model_without_experts_is_refused():
    with pytest.raises(UserError, match=r"router_aux_loss_coef=0.1: the model has no experts; expected none"):
        decoder_loss(cross_entropy, router_aux_loss_coef=0.1)(decoder(), {})
