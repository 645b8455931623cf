"""Direct preference optimisation against its definition in float64, rearranged, and learning."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_decoder import decoder

from jaxstack.models import LoraParam, dense_attention, lora
from jaxstack.runtime.errors import UserError
from jaxstack.training.data import Example
from jaxstack.training.log_probs import decoder_log_probs, make_log_prob_step, without_adapters
from jaxstack.training.optimizer import OptimizerConfig, build_optimizer
from jaxstack.training.preference import Dpo, Preference, dpo_loss, pair_batches
from jaxstack.training.step import init_state, loss_gradients, make_train_step, split_model


def preferences(count=5, seed=0) -> list[Preference]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt = rng.integers(0, 61, rng.integers(1, 5))
        answers = []
        for _ in range(2):
            answer = rng.integers(0, 61, rng.integers(1, 7))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            answers.append(Example(ids, np.arange(len(ids)) >= len(prompt)))
        made.append(Preference(*answers))
    return made


def on_device(batch):
    return {k: jnp.asarray(v) for k, v in batch.items()}


def reference(pairs, dpo, forward, forward_ref):
    """Each answer by itself, in float64."""
    losses, margins, rewards = [], [], []
    for pair in pairs:
        both = []
        for example in (pair.chosen, pair.rejected):
            ids = np.pad(example.token_ids, (0, 16 - len(example.token_ids)))
            sums = []
            for run in (forward, forward_ref):
                logits = np.asarray(run(ids), np.float64)
                logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                sums.append(sum(logp[t - 1, ids[t]] for t in np.flatnonzero(example.loss_mask)))
            both.append(dpo.beta * (sums[0] - sums[1]))
        h = both[0] - both[1]
        e = dpo.label_smoothing
        losses.append((1 - e) * math.log1p(math.exp(-h)) + e * math.log1p(math.exp(h)))
        margins.append(h)
        rewards.append(both)
    return np.mean(losses), np.array(margins), np.array(rewards)


@functools.cache
def models():
    """A split model and two policies."""
    split, policy, _ = split_model(decoder(seed=0), nnx.Param)
    other = split_model(decoder(seed=1), nnx.Param)[1]
    near = {k: v + 0.3 * (other[k] - v) for k, v in policy.items()}
    forward = jax.jit(lambda params, ids: split.merge(params)(ids, jnp.arange(16), dense_attention())[0])
    return split, policy, near, forward


@functools.cache
def gradient(dpo, accum, chunk=None):
    split = models()[0]
    loss = dpo_loss(dpo, chunk_tokens=chunk)
    return jax.jit(lambda p, b: loss_gradients(split, loss, p, {}, b, accum))


@functools.cache
def reference_step():
    return make_log_prob_step(models()[0], decoder_log_probs())


def with_reference(batch):
    batch = on_device(batch)
    return {**batch, "logp_ref": reference_step()(models()[2], {}, batch)}


def test_loss_and_metrics_equal_the_definition():
    _, policy, near, forward = models()
    dpo, pairs = Dpo(beta=0.5), preferences()
    (batch,) = pair_batches(pairs, row_count=4, row_length=40)
    parts, _ = gradient(dpo, 1)(policy, with_reference(batch))
    expected, margins, rewards = reference(
        pairs, dpo, functools.partial(forward, policy), functools.partial(forward, near)
    )
    assert float(parts.den) == 5
    assert float(parts.num / parts.den) == pytest.approx(expected, rel=2e-5)
    found = {k: float(a / b) for k, (a, b) in parts.aux.items()}
    assert found["accuracy"] == pytest.approx(np.mean(margins > 0))
    assert found["margin"] == pytest.approx(np.mean(margins), rel=1e-3, abs=1e-4)
    assert found["chosen_reward"] == pytest.approx(np.mean(rewards[:, 0]), rel=1e-3, abs=1e-4)
    assert found["rejected_reward"] == pytest.approx(np.mean(rewards[:, 1]), rel=1e-3, abs=1e-4)
    assert 0 < found["accuracy"] < 1


@pytest.mark.parametrize("dpo", [Dpo(), Dpo(beta=0.4, label_smoothing=0.2)])
def test_gradient_by_log_probabilities_is_the_closed_form(dpo):
    """d loss / d logp[t] = +-beta (sigmoid(h) - 1 + label_smoothing) / pairs, + for chosen, - for rejected tokens."""
    (batch,) = pair_batches(preferences(), row_count=4, row_length=40)
    logp, logp_ref = (np.random.default_rng(s).normal(-2, 1, (4, 40)) for s in (0, 1))

    def mean(logp):
        parts = dpo.parts(logp, jnp.asarray(logp_ref, jnp.float32), on_device(batch))
        return parts.num / parts.den

    value, found = jax.jit(jax.value_and_grad(mean))(jnp.asarray(logp, jnp.float32))
    sign = np.where(batch["segment_ids"] % 2 == 1, 1.0, -1.0) * batch["loss_mask"]
    expected, losses, smooth = np.zeros((4, 40)), [], dpo.label_smoothing
    for r in range(4):
        for pair in range(batch["segment_ids"][r].max() // 2):
            own = (batch["segment_ids"][r] - 1) // 2 == pair
            h = dpo.beta * (sign[r] * (logp - logp_ref)[r])[own].sum()
            losses.append((1 - smooth) * math.log1p(math.exp(-h)) + smooth * math.log1p(math.exp(h)))
            expected[r, own] = (sign[r] * dpo.beta * (1 / (1 + math.exp(-h)) - 1 + smooth) / 5)[own]
    assert len(losses) == 5 and float(value) == pytest.approx(np.mean(losses), rel=1e-5)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_microbatches_row_order_and_chunks_change_nothing():
    _, policy, _, _ = models()
    dpo = Dpo(beta=0.5)
    (batch,) = pair_batches(preferences(6, seed=2), row_count=4, row_length=40)
    data = with_reference(batch)
    parts, grads = gradient(dpo, 1)(policy, data)
    swapped = {k: v[jnp.array([2, 0, 3, 1])] for k, v in data.items()}
    other, other_grads = gradient(dpo, 2, 33)(policy, swapped)
    assert float(other.den) == float(parts.den) == 6
    assert float(other.num) == pytest.approx(float(parts.num), rel=1e-5)
    for name, expected in grads.items():
        error = np.linalg.norm(np.asarray(other_grads[name] - expected)) / np.linalg.norm(expected)
        assert error < 2e-5, name


def test_an_empty_batch_and_a_lone_answer_count_for_nothing():
    _, policy, _, _ = models()
    (batch,) = pair_batches(preferences(1), row_count=4, row_length=40)
    data = with_reference(batch)
    lone = {**data, "segment_ids": jnp.where(data["segment_ids"] == 2, 0, data["segment_ids"])}
    for broken in (lone, jax.tree.map(jnp.zeros_like, data)):
        parts, grads = gradient(Dpo(beta=0.5), 1)(policy, broken)
        assert float(parts.num) == 0 and float(parts.den) == 0
        assert not any(np.asarray(g).any() for g in grads.values())


def test_the_frozen_model_under_lora_is_the_reference_and_pairs_are_learnt_without_a_recompilation():
    model = decoder()
    lora.attach(model, lora.LoraConfig(r=4, alpha=8.0, targets=("v_proj", "lm_head")))
    split, params, frozen = split_model(model, LoraParam)
    rng = np.random.default_rng(0)
    params = {
        k: v.at[..., 1, :, :].set(0.05 * rng.normal(size=v[..., 1, :, :].shape)) if k.endswith(".b") else v
        for k, v in params.items()
    }
    (batch,) = pair_batches(preferences(6), row_count=2, row_length=64)
    batch = on_device(batch)
    step = make_log_prob_step(split, decoder_log_probs())
    logp, logp_ref = step(params, frozen, batch), step(params, frozen, without_adapters(batch))
    dpo = Dpo(reference="no_adapter")
    expected = dpo.parts(logp, logp_ref, batch)
    assert abs(float(expected.aux["margin"][0])) > 1e-3
    config = OptimizerConfig(learning_rate=0.02, schedule="constant", warmup_ratio=0.0)
    optimizer = build_optimizer(config, params, total_steps=15, adapters=True)
    train = make_train_step(split, dpo_loss(dpo), optimizer)
    state = init_state(params, optimizer)
    frozen = jax.device_put(frozen, jax.devices()[0])
    for number in range(15):
        state, metrics = train(state, frozen, batch)
        if number == 0:
            assert float(metrics["loss_num"]) == pytest.approx(float(expected.num), rel=1e-5)
            for name, (num, _) in expected.aux.items():
                assert float(metrics["aux"][name][0]) == pytest.approx(float(num), rel=1e-3, abs=1e-5)
    assert train._cache_size() == 1
    assert float(metrics["loss_num"] / metrics["loss_den"]) < 0.2
    assert float(metrics["aux"]["accuracy"][0]) == 6


EMPTY = Example(np.arange(3, dtype=np.int32), np.arange(3) < 1)
BAD = [
    (lambda: Dpo(beta=0.0), "Dpo.beta=0.0: expected a positive number"),
    (lambda: Dpo(label_smoothing=0.5), "Dpo.label_smoothing=0.5"),
    (lambda: Dpo(reference="model"), "Dpo.reference='model': expected batch or no_adapter"),
    (lambda: pair_batches([], row_count=1, row_length=8), "no pair to make a batch of"),
    (lambda: pair_batches(preferences(1), row_count=1, row_length=4), "pair 0 has .* tokens, expected at most"),
    (lambda: pair_batches([Preference(EMPTY, EMPTY)], row_count=1, row_length=8), "pair 0: chosen has no trained"),
    (lambda: dpo_loss(Dpo())(decoder(), {"token_ids": jnp.zeros((1, 8), int)}), "the batch has no logp_ref"),
    (lambda: dpo_loss(Dpo(reference="no_adapter"))(decoder(), {}), "the model has no adapters"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_input_gets_one_line(number):
    run, message = BAD[number]
    with pytest.raises(UserError, match=message) as error:
        run()
    assert "\n" not in str(error.value)
