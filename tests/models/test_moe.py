"""Mixtures of experts against a loop over tokens, in training form and served."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.models import Decoder, DecoderConfig, MoeConfig, dense_attention
from jaxstack.models.attention import FULL_WINDOW, LayerContext
from jaxstack.models.hf_names import flat_params
from jaxstack.models.moe import Moe, RouterSums, load_balancing_loss, route, router_sums
from jaxstack.models.rope import rotation
from jaxstack.models.serving_layout import fuse_for_serving
from jaxstack.runtime.errors import UserError
from kernels.matmul import StackedWeight

CONFIG = DecoderConfig(
    architecture="Qwen3MoeForCausalLM",
    vocab_size=31,
    hidden_size=16,
    intermediate_size=20,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    moe=MoeConfig(num_experts=6, experts_per_token=3, intermediate_size=12, dense_layers=(1,)),
)
TOKENS = jnp.asarray(np.random.default_rng(5).integers(0, 31, 40))


def noisy(module, seed=0):
    generator = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Param)
    fresh = jax.tree.map(lambda x: jnp.asarray(0.4 * generator.standard_normal(x.shape, np.float32)), state)
    nnx.update(module, fresh)
    return module


def abstract_moe(config):
    return nnx.eval_shape(lambda: Moe(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32))


def silu(x):
    return x / (1 + np.exp(-x))


def by_loop(moe, config, x):
    """float64, one token after the other."""
    router = np.asarray(moe.router.kernel.get_value(), np.float64)
    gate, up, down = (
        np.asarray(part.kernel.get_value(), np.float64) for part in (moe.gate_proj, moe.up_proj, moe.down_proj)
    )
    out = np.zeros_like(x, np.float64)
    for t, row in enumerate(np.asarray(x, np.float64)):
        scores = np.exp(row @ router)
        probabilities = scores / scores.sum()
        chosen = np.argsort(-probabilities, kind="stable")[: config.moe.experts_per_token]
        weights = probabilities[chosen]
        if config.moe.weight_norm is not None:
            weights = weights / np.linalg.norm(weights, ord=config.moe.weight_norm)
        for weight, e in zip(weights, chosen):
            out[t] += weight * ((silu(row @ gate[e]) * (row @ up[e])) @ down[e])
    return out


@pytest.mark.parametrize("norm", [None, 1.0, 2.0])
def test_equals_a_loop_over_tokens(norm):
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, weight_norm=norm))
    moe = noisy(abstract_moe(config))
    x = np.random.default_rng(1).standard_normal((2, 11, 16), np.float32)
    found = moe(jnp.asarray(x))
    assert found.shape == x.shape
    np.testing.assert_allclose(found.reshape(22, 16), by_loop(moe, config, x.reshape(22, 16)), atol=2e-5)


def test_routing_ties_go_to_the_lower_number():
    weights, experts = route(jnp.zeros((2, 6)), CONFIG.moe)
    assert experts.tolist() == [[0, 1, 2]] * 2
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


def test_gradients_equal_those_of_running_every_expert():
    moe = noisy(abstract_moe(CONFIG))
    graphdef, state = nnx.split(moe)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((23, 16), np.float32))

    def every_expert(state, x):
        moe = nnx.merge(graphdef, state)
        weights, experts = route(moe.router(x), CONFIG.moe)
        dense = jnp.zeros((23, 6)).at[jnp.arange(23)[:, None], experts].set(weights)
        gate, up, down = (part.kernel.get_value() for part in (moe.gate_proj, moe.up_proj, moe.down_proj))
        inner = nnx.silu(jnp.einsum("td,edf->tef", x, gate)) * jnp.einsum("td,edf->tef", x, up)
        return jnp.sum(jnp.sin(jnp.einsum("te,tef,efd->td", dense, inner, down)))

    def sorted_rows(state, x):
        return jnp.sum(jnp.sin(nnx.merge(graphdef, state)(x)))

    expected, found = (jax.jit(jax.grad(f, (0, 1)))(state, x) for f in (every_expert, sorted_rows))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
        assert np.asarray(a).any()


def layer_by_layer(decoder, scores=None):
    """Logits by a plain loop over layers, each cut out of the stacks; appends the routers' outputs to `scores`."""
    config, x = decoder.config, decoder.embed(TOKENS)

    cos, sin = rotation(jnp.arange(len(TOKENS)), config.rope, config.head_dim)
    for i in range(config.num_layers):
        layer = nnx.clone(decoder.layers)
        kind, place = ("moe", config.sparse_layers) if i in config.sparse_layers else ("mlp", config.dense_layers)
        setattr(layer, "mlp" if kind == "moe" else "moe", None)
        state = nnx.state(layer, nnx.Param)
        cut = [
            (p, v.replace(v.get_value()[place.index(i) if p[0] == kind else i])) for p, v in nnx.to_flat_state(state)
        ]
        nnx.update(layer, nnx.from_flat_state(cut))
        context = LayerContext(jnp.int32(i), jnp.int32(FULL_WINDOW))
        if scores is not None and kind == "moe":
            out, _ = dense_attention()(*layer.before_attention(x, cos, sin, None), context, None)
            between = x + layer.self_attn.join(out, None)
            scores.append(layer.post_attention_layernorm(between) @ layer.moe.router.kernel.get_value())
        x, _ = layer(x, cos, sin, dense_attention(), context, None, None)
    return decoder.logits(decoder.final_norm(x))


def router_scores(decoder):
    scores = []
    layer_by_layer(decoder, scores)
    return scores


@pytest.fixture(scope="module")
def decoder():
    return noisy(Decoder.abstract(CONFIG))


def logits_of(decoder):
    graphdef, state = nnx.split(decoder)
    return jax.jit(lambda s: nnx.merge(graphdef, s)(TOKENS, jnp.arange(len(TOKENS)), dense_attention())[0])(state)


def test_stacks_hold_the_layers_of_their_kind(decoder):
    shapes = {".".join(path[1:]): value.shape for path, value in flat_params(decoder).items() if path[0] == "layers"}
    assert shapes["self_attn.q_proj.kernel"] == (4, 16, 16)
    assert shapes["mlp.gate_proj.kernel"] == (1, 16, 20)
    assert shapes["moe.router.kernel"] == (3, 16, 6)
    assert shapes["moe.gate_proj.kernel"] == (3, 6, 16, 12)
    assert shapes["moe.down_proj.kernel"] == (3, 6, 12, 16)
    graphdef, state = nnx.split(decoder)
    expected = jax.jit(lambda state: layer_by_layer(nnx.merge(graphdef, state)))(state)
    np.testing.assert_allclose(logits_of(decoder), expected, atol=1e-4)


@pytest.mark.parametrize("pack", [False, True])
def test_serving_layout_gives_the_same_logits(decoder, pack):
    expected = logits_of(decoder)
    fused = fuse_for_serving(decoder, pack=pack)
    np.testing.assert_allclose(logits_of(fused), expected, atol=1e-4)
    np.testing.assert_array_equal(logits_of(decoder), expected)  # the original is still whole
    assert fused.layers.moe.gate_proj is None
    assert isinstance(fused.layers.moe.gate_up_proj.kernel.get_value(), StackedWeight)


def test_a_step_that_trains_reaches_every_parameter(decoder):
    graphdef, state = nnx.split(decoder)

    def loss(state):
        logits, _ = nnx.merge(graphdef, state)(TOKENS, jnp.arange(len(TOKENS)), dense_attention(), remat="full")
        return -jax.nn.log_softmax(logits)[:, 0].mean()

    gradients = jax.jit(jax.grad(loss))(state)
    for path, gradient in nnx.to_flat_state(gradients):
        assert np.isfinite(np.asarray(gradient.get_value())).all()
        parts = gradient.get_value() if path[0] == "layers" else [gradient.get_value()]
        assert all(np.asarray(part).any() for part in parts), path


def test_load_balancing_loss_equals_transformers_with_its_gradient():
    with np.load(Path(__file__).parents[1] / "golden" / "training" / "router.npz") as found:
        golden = dict(found)
    moe = dataclasses.replace(CONFIG.moe, num_experts=5, experts_per_token=2)

    def loss(scores):
        layers = [router_sums(s, route(s, moe)[1], golden["mask"].reshape(-1) != 0) for s in scores]
        return load_balancing_loss(jax.tree.map(lambda *s: sum(s), *layers))

    found, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(golden["scores"]))
    assert float(found) == pytest.approx(float(golden["loss"]), rel=1e-6)
    np.testing.assert_allclose(gradient, golden["gradient"], atol=1e-7)
    nothing = RouterSums(jnp.zeros(5), jnp.zeros(5), jnp.float32(0))
    assert float(load_balancing_loss(nothing)) == 0
    even = RouterSums(jnp.full(5, 4.0), jnp.full(5, 2.0), jnp.float32(10))
    assert float(load_balancing_loss(even)) == pytest.approx(2)


def test_routing_is_counted_in_every_sparse_layer_and_without_what_is_masked(decoder):
    counted = jnp.arange(len(TOKENS)) % 5 != 0
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def run(state):
        model = nnx.merge(graphdef, state)
        args = (TOKENS, jnp.arange(len(TOKENS)), dense_attention())
        return model.hidden_and_routing(*args, None, counted, remat="full"), router_scores(model)

    (_, _, sums), layers = run(state)
    chosen, probability = np.zeros(6), np.zeros(6)
    for scores in layers:
        shares = np.exp(np.asarray(scores, np.float64))
        for row in (shares / shares.sum(-1, keepdims=True))[np.asarray(counted)]:
            chosen[np.argsort(-row)[:3]] += 1
            probability += row
    assert len(layers) == 3 and float(sums.tokens) == 3 * 32
    np.testing.assert_array_equal(sums.chosen, chosen)
    np.testing.assert_allclose(sums.probability, probability, rtol=1e-4)


def test_served_experts_are_not_copied_out_of_the_stack():
    sizes = {"hidden_size": 128, "vocab_size": 8, "num_layers": 3, "layer_windows": ()}
    moe = MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=256)
    fused = fuse_for_serving(noisy(Decoder.abstract(dataclasses.replace(CONFIG, moe=moe, **sizes))), pack=True)
    graphdef, state = nnx.split(fused)
    step = jax.jit(lambda state, t: nnx.merge(graphdef, state)(t, t, dense_attention())[0])
    memory = step.lower(state, jnp.zeros(4, jnp.int32)).compile().memory_analysis()
    one_layer_bytes = 4 * 8 * 3 * 128 * 256
    assert memory.temp_size_in_bytes < one_layer_bytes / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 7}, "moe.experts_per_token: found 7, expected at most num_experts = 6"),
        ({"num_experts": 0}, "moe.num_experts: found 0, expected a positive integer"),
        ({"weight_norm": -1.0}, "moe.weight_norm: found -1.0, expected a positive number"),
        ({"dense_layers": (3, 0)}, "moe.dense_layers: found (3, 0), expected ascending"),
        ({"dense_layers": (4,)}, "moe.dense_layers: found 4, expected numbers below num_layers = 4"),
    ],
)
def test_bad_mixtures_get_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **changes))
    assert message in str(caught.value)
