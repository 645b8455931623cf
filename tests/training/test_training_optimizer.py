import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxstack.runtime.errors import UserError
from jaxstack.training.optimizer import OptimizerConfig, build_optimizer, learning_rate_schedule


def rates(total=10, **fields):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, **fields), total)
    return np.array([float(schedule(jnp.int32(step))) for step in range(total)])


def test_schedules_against_closed_forms():
    np.testing.assert_allclose(rates(schedule="constant"), 1.0)
    np.testing.assert_allclose(rates(schedule="linear", end_lr_ratio=0.1), np.linspace(1, 0.1, 10), rtol=1e-6)
    cosine = 0.2 + 0.8 * (1 + np.cos(np.pi * np.arange(10) / 9)) / 2
    np.testing.assert_allclose(rates(schedule="cosine", end_lr_ratio=0.2), cosine, rtol=1e-5)
    warm = rates(schedule="constant", warmup_steps=4)
    np.testing.assert_allclose(warm, [0.25, 0.5, 0.75, 1, *[1] * 6], rtol=1e-6)
    np.testing.assert_allclose(rates(schedule="constant", warmup_ratio=0.4), warm)
    wsd = rates(schedule="wsd", warmup_steps=2, decay_ratio=0.4)
    np.testing.assert_allclose(wsd, [0.5, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0], atol=1e-6)
    both = rates(schedule="cosine", warmup_steps=4)
    np.testing.assert_allclose(both[4:], (1 + np.cos(np.pi * np.arange(6) / 5)) / 2, atol=1e-6)


def test_a_warm_up_longer_than_the_run():
    with pytest.raises(UserError, match="11 warm-up steps do not fit into 10 steps"):
        learning_rate_schedule(OptimizerConfig(warmup_steps=11), 10)
    with pytest.raises(UserError, match="6 warm-up steps and 5 decay steps do not fit"):
        learning_rate_schedule(OptimizerConfig(schedule="wsd", warmup_steps=6, decay_ratio=0.5), 10)


PARAMS = {
    "embed.embedding": jnp.ones((5, 4)),
    "layers.mlp.up_proj.kernel": jnp.ones((2, 4, 6)),
    "layers.self_attn.q_proj.bias": jnp.ones((2, 4)),
    "final_norm.weight": jnp.ones((4,)),
}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_every_rule_goes_downhill_and_decays_matrices_only(name):
    target = {k: jnp.linspace(-1, 2, v.size).reshape(v.shape) for k, v in PARAMS.items()}

    def loss(p):
        return sum(jnp.sum((p[k] - target[k]) ** 2) for k in p)

    config = OptimizerConfig(name=name, learning_rate=0.02, schedule="constant", weight_decay=0.0)
    optimizer = build_optimizer(config, PARAMS, total_steps=30)
    params, state = PARAMS, optimizer.transform.init(PARAMS)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.transform.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(30):
        params, state = step(params, state)
    assert float(loss(params)) < 0.8 * float(loss(PARAMS))
    # With a gradient of zero what moves a parameter is its decay.
    decaying = build_optimizer(
        OptimizerConfig(name=name, learning_rate=0.5, schedule="constant", weight_decay=0.1), PARAMS, total_steps=30
    ).transform
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = jax.jit(decaying.update)(zero, decaying.init(PARAMS), PARAMS)
    moved = {k for k, v in updates.items() if bool(jnp.any(v != 0))}
    assert moved == {"layers.mlp.up_proj.kernel"}


def test_adamw_equals_its_formula():
    config = OptimizerConfig(learning_rate=0.1, schedule="constant", b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.5)
    optimizer = build_optimizer(config, ["x.kernel"], total_steps=5)
    x, m, v = np.array([1.0, -2.0]), np.zeros(2), np.zeros(2)
    params = {"x.kernel": jnp.asarray(x, jnp.float32)}
    state = optimizer.transform.init(params)
    for t in range(1, 4):
        g = np.array([0.3, -0.1]) * t
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        x = x - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8) + 0.5 * x)
        updates, state = optimizer.transform.update({"x.kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["x.kernel"], x, rtol=1e-5)


def test_default_weight_decay_is_0_for_adapters():
    for adapters, expected in ((True, 0.0), (False, -0.01)):
        optimizer = build_optimizer(
            OptimizerConfig(learning_rate=1.0, schedule="constant"), ["a"], total_steps=2, adapters=adapters
        )
        params = {"a": jnp.ones(3)}
        updates, _ = optimizer.transform.update({"a": jnp.zeros(3)}, optimizer.transform.init(params), params)
        np.testing.assert_allclose(updates["a"], expected, atol=1e-9)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"name": "adam"}, "optimizer.name='adam': expected one of adamw, adafactor"),
        ({"schedule": "step"}, "optimizer.schedule='step'"),
        ({"learning_rate": 0.0}, "optimizer.learning_rate=0.0: expected a positive number"),
        ({"learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
        ({"warmup_ratio": 1.5}, "optimizer.warmup_ratio=1.5: expected a number from 0 to 1"),
        ({"warmup_steps": -1}, "optimizer.warmup_steps=-1"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
        ({"clip_norm": 0.0}, "optimizer.clip_norm=0.0"),
        ({"max_skipped_in_row": 0}, "optimizer.max_skipped_in_row=0"),
    ],
)
def test_bad_optimizer_configs(fields, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**fields)
