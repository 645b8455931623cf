"""The loss and the step against float64 NumPy, dense attention, finite differences, and themselves rearranged."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoder import CONFIG, batch, decoder, examples

from jaxstack.models import LayerContext, LoraParam, dense_attention, lora
from jaxstack.models.training_layout import fuse_for_training
from jaxstack.training.losses import chunked, cross_entropy, shift_targets, token_log_probs
from jaxstack.training.optimizer import OptimizerConfig, build_optimizer
from jaxstack.training.packed_attention import packed_attention
from jaxstack.training.step import (
    decoder_loss,
    init_state,
    loss_gradients,
    make_eval_step,
    make_train_step,
    parameter_count,
    split_model,
)


def oracle(logits, data) -> tuple[float, float]:
    """num and den of the specification, token by token in float64."""
    num = den = 0.0
    ids, seg, mask = (np.asarray(data[k]) for k in ("token_ids", "segment_ids", "loss_mask"))
    logits = np.asarray(logits, np.float64)
    for r in range(ids.shape[0]):
        for t in range(ids.shape[1] - 1):
            w = mask[r, t + 1] * (seg[r, t + 1] == seg[r, t]) * (seg[r, t] != 0)
            row = logits[r, t]
            nll = row.max() + np.log(np.exp(row - row.max()).sum()) - row[ids[r, t + 1]]
            num, den = num + w * nll, den + w
    return num, den


@functools.cache
def compiled(accum_steps: int = 1, **options):
    """The compiled gradient of the tiny decoder's loss."""
    split, _, _ = split_model(decoder(), nnx.Param)
    loss = decoder_loss(cross_entropy, **options)
    return jax.jit(lambda params, data: loss_gradients(split, loss, params, {}, data, accum_steps))


@functools.cache
def parameters():
    return split_model(decoder(), nnx.Param)[1]


def gradients(data, **options):
    return compiled(**options)(parameters(), data)


def relative(a, b) -> float:
    """Relative L2 distance of two trees."""
    a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]).astype(np.float64) for t in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_cross_entropy_of_three_packed_documents_equals_float64_numpy():
    items = examples(3, seed=1, longest=9)
    data = batch(items, [[0, 2], [1]], 24, row_count=3)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 24, 61)) * 5, jnp.float32)
    num, den = oracle(logits, data)
    parts = cross_entropy(logits, shift_targets(data))
    assert float(parts.den) == den > 0
    np.testing.assert_allclose(float(parts.num), num, rtol=1e-6)
    log_probs = token_log_probs(logits, shift_targets(data)["token_ids"])
    assert log_probs.shape == (3, 24) and bool((log_probs <= 0).all())


def test_whole_model_loss_equals_numpy_on_logits_of_separate_documents():
    """Packing, positions and masks at once: each document alone, dense attention, no padding; summed in float64."""
    items = examples(5, seed=2, longest=14)
    split, params, _ = split_model(decoder(), nnx.Param)
    forward = jax.jit(lambda params, tokens: split.merge(params)(tokens, jnp.arange(16), dense_attention())[0])
    num = den = 0.0
    for item in items:
        alone = batch([item], [[0]], 16)  # what follows a causal document does not change it
        logits = forward(params, alone["token_ids"][0])[None]
        a, b = oracle(logits, alone)
        num, den = num + a, den + b
    parts, _ = gradients(batch(items, [[0, 3], [1], [4, 2]], 48, row_count=6))
    assert float(parts.den) == den
    np.testing.assert_allclose(float(parts.num), num, rtol=2e-6)


@pytest.mark.parametrize(
    "length,window,longest,softcap",
    [(40, 2**30, None, None), (160, 5, None, 1.5), (160, 2**30, 60, None), (130, 17, 43, 1.5)],
)
def test_packed_attention_equals_dense_attention_with_its_gradients(length, window, longest, softcap):
    rng = np.random.default_rng(length + window % 100)
    items = examples(12, seed=3, longest=length // 3)
    lengths = [len(e.token_ids) for e in items]
    data = batch(items, [[i for i in range(6) if sum(lengths[: i + 1]) <= length], [6, 7]], length)
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4))
    layer = LayerContext(jnp.int32(0), jnp.int32(window), scale=None if softcap is None else 0.6, softcap=softcap)
    real = (data["segment_ids"] != 0)[..., None, None]  # what padding attends to is nobody's business

    def dense(q, k, v):
        out, _ = dense_attention(data["segment_ids"], data["positions"])(q, k, v, layer, None)
        return jnp.sum(jnp.where(real, out * d_out, 0.0)), out

    def packed(q, k, v):
        flat = (x.reshape(2 * length, *x.shape[2:]) for x in (q, k, v))
        out, cache = packed_attention(data["positions"], longest=longest)(*flat, layer, "cache")
        assert cache == "cache"
        out = out.reshape(q.shape)
        return jnp.sum(jnp.where(real, out * d_out, 0.0)), out

    (_, expected), expected_grads = jax.jit(jax.value_and_grad(dense, (0, 1, 2), has_aux=True))(q, k, v)
    (_, found), grads = jax.jit(jax.value_and_grad(packed, (0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(jnp.where(real, found, 0), jnp.where(real, expected, 0), atol=2e-6)
    assert relative(grads, expected_grads) < 2e-6
    assert bool(jnp.isfinite(found).all())


@settings(max_examples=8, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(0, 1000))
def test_loss_and_gradient_do_not_depend_on_row_order_packing_or_microbatches(rng, seed):
    items = examples(6, seed=seed, longest=12)
    order = list(range(6))
    rng.shuffle(order)
    reference, expected = gradients(batch(items, [[i] for i in range(6)], 48))
    packed = [order[:3], order[3:5], order[5:]]
    rng.shuffle(packed)
    for rows, count, accum in ((packed, 6, 1), ([[i] for i in order], 6, 3)):
        parts, found = gradients(batch(items, rows, 48, row_count=count), accum_steps=accum)
        assert float(parts.den) == float(reference.den)
        np.testing.assert_allclose(float(parts.num), float(reference.num), rtol=2e-6)
        assert relative(found, expected) < 1e-5


def test_an_all_padding_batch_gives_zero_gradient_and_finite_numbers():
    parts, grads = gradients(batch(examples(1), [], 48, row_count=6))
    assert float(parts.num) == 0 and float(parts.den) == 0
    assert all(not np.asarray(g).any() for g in grads.values())


def test_chunked_head_equals_the_plain_one():
    data = batch(examples(5, seed=6), [[0, 1], [2, 3], [4]], 48)
    targets = {k: v.reshape(-1) for k, v in shift_targets(data).items()}
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3 * 48, 16), (16, 61)))

    def plain(hidden, head):
        parts = cross_entropy(hidden @ head, targets)
        return 1.5 * parts.num, parts

    def cut(hidden, head):
        parts = chunked(cross_entropy, lambda h: h @ head, hidden, targets, 37)
        return 1.5 * parts.num, parts

    expected_grads, expected = jax.jit(jax.grad(plain, (0, 1), has_aux=True))(hidden, head)
    grads, parts = jax.jit(jax.grad(cut, (0, 1), has_aux=True))(hidden, head)
    for found in (parts, jax.jit(cut)(hidden, head)[1]):
        assert relative(found.num, expected.num) < 1e-6
        assert float(found.den) == float(expected.den)
        assert float(found.aux["accuracy"][0]) == float(expected.aux["accuracy"][0])
    assert relative(grads, expected_grads) < 1e-6
    # A frozen head is multiplied twice by each chunk, one that learns three times; a backward pass not by any.
    for argument, products in ((0, 2), ((0, 1), 3)):
        text = str(jax.make_jaxpr(jax.grad(lambda *x: cut(*x)[0], argument))(hidden, head))
        assert text.count("dot_general[") == products, text
    assert not any(np.asarray(g).any() for g in jax.grad(lambda *x: cut(*x)[1].den, (0, 1))(hidden, head))


@pytest.mark.parametrize(
    "options,spare",
    [
        ({}, 0),
        ({"chunk_tokens": 13}, 3),
        ({"accum_steps": 3}, 0),
        ({"unroll": True, "chunk_tokens": 13}, 3),  # the last layer, too, without the other tokens
        ({"unroll": True, "accum_steps": 3, "remat": "full"}, 0),
    ],
    ids=str,
)
def test_target_tokens_alone_give_the_same_loss_and_gradient(options, spare):
    data = batch(examples(5, seed=8), [[0, 1], [2], [3, 4]], 48, row_count=6)
    expected, expected_grads = gradients(data)
    weights = np.asarray(shift_targets(data)["weights"])
    fullest = int(weights.reshape(options.get("accum_steps", 1), -1).sum(-1).max())
    parts, grads = gradients(data, most_targets=fullest + spare, **options)
    assert float(parts.den) == float(expected.den) > fullest // 2
    assert relative(parts.num, expected.num) < 1e-6 and relative(grads, expected_grads) < 1e-5
    assert float(parts.aux["accuracy"][0]) == float(expected.aux["accuracy"][0])


def test_remat_chunks_and_unrolling_change_nothing():
    data = batch(examples(3), [[0, 1], [2]], 48, row_count=6)
    _, expected = gradients(data)
    for options in ({"remat": "full", "chunk_tokens": 100}, {"unroll": True}):
        _, found = gradients(data, **options)
        assert relative(found, expected) < 1e-5


def test_lora_gradients_equal_finite_differences():
    model = decoder()
    lora.attach(model, lora.LoraConfig(r=3, alpha=6.0), seed=1)
    split, params, frozen = split_model(model, LoraParam)
    rng = np.random.default_rng(0)
    # B away from zero, or the gradient of A would be zero.
    params = {
        k: v if k.endswith(".a") else v.at[:, 1].set(rng.normal(size=v[:, 1].shape) * 0.1) if v.ndim == 4 else v
        for k, v in params.items()
    }
    data = batch(examples(4, seed=7), [[0, 1], [2, 3]], 40)
    loss = decoder_loss(cross_entropy)
    _, grads = jax.jit(lambda p: loss_gradients(split, loss, p, frozen, data))(params)
    den = float(shift_targets(data)["weights"].sum())
    value = jax.jit(lambda p: loss(split.merge(p, frozen), data).num / den)
    for name in ("layers.self_attn.q_proj.lora.a", "layers.self_attn.v_proj.lora.b", "layers.mlp.down_proj.lora.a"):
        direction = rng.normal(size=params[name].shape).astype(np.float32)
        direction /= np.linalg.norm(direction)
        # Central differences in float32: the best step balances rounding and curvature.
        h = 0.05
        up, down = (value({**params, name: params[name] + sign * h * direction}) for sign in (1, -1))
        slope = (float(up) - float(down)) / (2 * h)
        expected = float(jnp.sum(grads[name] * direction))
        assert slope == pytest.approx(expected, rel=0.02, abs=2e-5), name


@pytest.mark.parametrize("bias", [False, True])
def test_compiled_forms_between_the_products_change_no_gradient(bias):
    data = batch(examples(4, seed=7), [[0, 1], [2, 3]], 40)
    config = dataclasses.replace(CONFIG, qkv_bias=bias, mlp_bias=bias)
    found = []
    for layout in (fuse_for_training, lambda model: model):
        model = decoder(config)
        lora.attach(model, lora.LoraConfig(r=3, alpha=6.0), seed=1)
        split, params, frozen = split_model(model, LoraParam)
        rng = np.random.default_rng(0)  # B away from zero, and biases
        params = {
            k: v + 0.1 * rng.standard_normal(v.shape, np.float32) if k.endswith(".b") else v
            for k, v in sorted(params.items())
        }
        frozen = {k: v + 0.1 if k.endswith("bias") else v for k, v in frozen.items()}

        def value(params, layout=layout, split=split, frozen=frozen):
            model = layout(split.merge(params, frozen))
            flat = {k: v.reshape(-1) for k, v in data.items()}
            attend = packed_attention(data["positions"])
            hidden, _ = model.hidden(flat["token_ids"], flat["positions"], attend)
            return jnp.sum(jnp.sin(hidden) * (flat["segment_ids"] != 0)[:, None])

        found.append(jax.jit(jax.value_and_grad(value))(params))
    (fused, fused_gradients), (plain, plain_gradients) = found
    assert float(fused) == pytest.approx(float(plain), rel=1e-5)
    assert relative(fused_gradients, plain_gradients) < 1e-5


def test_optimizer_state_covers_trainable_parameters_only_at_eight_bytes_each():
    model = decoder()
    lora.attach(model, lora.LoraConfig(r=2))
    _, params, frozen = split_model(model, LoraParam)
    state = init_state(params, build_optimizer(OptimizerConfig(), params, total_steps=10, adapters=True))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.nbytes for x in moments) == 8 * parameter_count(params)
    assert parameter_count(params) < parameter_count(frozen)


@functools.cache
def compiled_step():
    """SGD with momentum at learning rate 0.3, gradients clipped to norm 0.5."""
    split, params, _ = split_model(decoder(), nnx.Param)
    config = OptimizerConfig(name="sgd", learning_rate=0.3, schedule="constant", clip_norm=0.5, weight_decay=0.0)
    optimizer = build_optimizer(config, params, total_steps=20)
    return make_train_step(split, decoder_loss(cross_entropy), optimizer), optimizer


def fresh_state():
    step, optimizer = compiled_step()
    return step, init_state(split_model(decoder(), nnx.Param)[1], optimizer)


def test_step_is_donated_and_clips_to_the_norm():
    items = examples(6, seed=8)
    data = batch(items, [[0, 1], [2, 3], [4, 5]], 48)
    step, old = fresh_state()
    before = {k: np.asarray(v).copy() for k, v in old.params.items()}
    state, metrics = step(old, {}, data)
    assert all(v.is_deleted() for v in old.params.values())
    moved = relative(state.params, before) * float(metrics["param_norm"])
    assert float(metrics["grad_norm"]) > 0.5 and moved == pytest.approx(0.15, rel=1e-3)
    assert float(metrics["update_norm"]) == pytest.approx(0.15, rel=1e-3)
    assert int(metrics["tokens"]) == sum(len(e.token_ids) for e in items)


def test_steps_learn_and_one_with_a_gradient_that_is_not_finite_keeps_parameters_and_moments():
    data = batch(examples(6, seed=8), [[0, 1], [2, 3], [4, 5]], 48)
    step, state = fresh_state()
    losses = []
    for _ in range(8):
        state, metrics = step(state, {}, data)
        losses.append(float(metrics["loss_num"] / metrics["loss_den"]))
    assert losses[-1] < losses[0] - 0.3
    kept = jax.tree.map(lambda x: np.asarray(x).copy(), (state.params, state.opt_state))
    state, metrics = step(state, {}, {**data, "loss_mask": data["loss_mask"] * jnp.inf})
    assert int(metrics["skipped"]) == 1 and int(state.step) == 9 and int(state.updates) == 8
    assert float(metrics["loss_num"]) == 0 and float(metrics["loss_den"]) == 0
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), kept)
    state, metrics = step(state, {}, data)
    assert int(metrics["skipped"]) == 0 and float(metrics["loss_num"] / metrics["loss_den"]) < losses[-1]


def test_bfloat16_compute_stays_near_float32():
    data = batch(examples(4, seed=11), [[0, 1], [2, 3]], 48, row_count=6)
    split, params, _ = split_model(decoder(), nnx.Param)
    parts = make_eval_step(split, decoder_loss(cross_entropy, compute_dtype=jnp.bfloat16))(params, {}, data)
    exact, _ = gradients(data)
    assert float(parts.num) == pytest.approx(float(exact.num), rel=0.03) and parts.num.dtype == jnp.float32
