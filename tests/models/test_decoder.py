"""The decoder's own promises: its shapes, its options, its adapters, its refusals."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.models import Decoder, DecoderConfig, LoraParam, LoraWeights, RopeConfig, dense_attention
from jaxstack.models.hf_names import flat_params
from jaxstack.models.rope import rotate, rotation
from jaxstack.models.serving_layout import fuse_for_serving
from jaxstack.runtime.errors import UserError
from kernels.matmul import PackedWeight, StackedWeight

CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    qk_norm=True,
    qkv_bias=True,
    mlp_bias=True,
    layer_windows=(None, 4, None),
    initializer_range=0.2,
)
TOKENS = jnp.array([[5, 9, 60, 0, 3, 3, 17, 22], [1, 2, 3, 4, 5, 6, 7, 8]])
POSITIONS = jnp.broadcast_to(jnp.arange(8), (2, 8))


def decoder_with_noise(config=CONFIG, seed=0):
    """Every parameter random, biases and norms too; drawn by numpy, which has nothing to compile."""
    decoder = Decoder.abstract(config)
    generator = np.random.default_rng(seed)

    def noisy(path, x):
        return jnp.asarray(0.3 * generator.standard_normal(x.shape, np.float32) + ("norm" in str(path)))

    nnx.update(decoder, jax.tree_util.tree_map_with_path(noisy, nnx.state(decoder, nnx.Param)))
    return decoder


@functools.partial(jax.jit, static_argnums=0, static_argnames="compute_dtype")
def _call(graphdef, state, tokens, positions, segments=None, **options):
    return nnx.merge(graphdef, state)(tokens, positions, dense_attention(segments, positions), **options)[0]


def call(decoder, *arrays, **options):
    """The decoder's logits, compiled whole."""
    return _call(*nnx.split(decoder), *arrays, **options)


def logits_of(decoder, **options):
    return call(decoder, TOKENS, POSITIONS, **options)


def with_adapters(decoder, modules, n_adapters=3, rank=2, seed=1):
    generator = np.random.default_rng(seed)
    for linear in modules(decoder):
        layers, width_in, width_out = linear.kernel.get_value().shape
        a = generator.standard_normal((layers, n_adapters, width_in, rank), np.float32)
        b = generator.standard_normal((layers, n_adapters, rank, width_out), np.float32)
        a[:, 0] = b[:, 0] = 0
        linear.lora = LoraWeights(jnp.asarray(a), jnp.asarray(b), jnp.full((layers, n_adapters), 0.1))
    return decoder


def some_modules(decoder):
    return decoder.layers.self_attn.q_proj, decoder.layers.self_attn.o_proj, decoder.layers.mlp.down_proj


def test_parameters_are_stacked_and_layers_differ():
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    shapes = {".".join(path): value.shape for path, value in flat_params(decoder).items()}
    assert shapes["layers.self_attn.q_proj.kernel"] == (3, 32, 48)
    assert shapes["layers.self_attn.k_proj.bias"] == (3, 24)
    assert shapes["layers.self_attn.q_norm.weight"] == (3, 12)
    assert shapes["layers.mlp.down_proj.kernel"] == (3, 40, 32)
    assert shapes["embed.embedding"] == (61, 32)
    assert shapes["lm_head.kernel"] == (32, 61)
    kernel = np.asarray(decoder.layers.mlp.up_proj.kernel.get_value())
    assert (kernel[0] != kernel[1]).all()
    assert kernel.std() == pytest.approx(0.2, rel=0.05)

    abstract = flat_params(Decoder.abstract(CONFIG, param_dtype=jnp.bfloat16))
    assert {path: value.shape for path, value in abstract.items()} == {
        path: value.shape for path, value in flat_params(decoder).items()
    }
    assert all(type(x) is jax.ShapeDtypeStruct and x.dtype == jnp.bfloat16 for x in abstract.values())


def test_leading_dimensions_are_free_and_attention_is_causal():
    decoder = decoder_with_noise()
    batched = logits_of(decoder)
    for row in range(2):
        flat = call(decoder, TOKENS[row], jnp.arange(8))
        np.testing.assert_allclose(flat, batched[row], atol=1e-5)
    shorter = call(decoder, TOKENS[:, :5], POSITIONS[:, :5])
    np.testing.assert_allclose(shorter, batched[:, :5], atol=1e-5)


def test_packed_documents_do_not_see_each_other():
    decoder = decoder_with_noise()
    segments = jnp.array([1, 1, 1, 2, 2, 2, 2, 0])
    positions = jnp.array([0, 1, 2, 0, 1, 2, 3, 0])
    packed = call(decoder, TOKENS[0], positions, segments)
    for start, stop in ((0, 3), (3, 7)):
        alone = call(decoder, TOKENS[0, start:stop], jnp.arange(stop - start))
        np.testing.assert_allclose(packed[start:stop], alone, atol=1e-5)


def test_remat_changes_no_gradient():
    decoder = decoder_with_noise()
    graphdef, state = nnx.split(decoder)

    def loss(state, remat):
        logits, _ = nnx.merge(graphdef, state)(TOKENS, POSITIONS, dense_attention(), remat=remat)
        return -jax.nn.log_softmax(logits)[..., 0].mean()

    plain, dots, full = (jax.jit(jax.grad(loss), static_argnums=1)(state, kind) for kind in ("none", "dots", "full"))
    for a, b, c in zip(*map(jax.tree.leaves, (plain, dots, full))):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)
        assert np.asarray(a).any()


def test_unknown_remat_is_refused():
    with pytest.raises(UserError, match="remat: found 'some', expected none, dots or full"):
        decoder_with_noise()(TOKENS, POSITIONS, dense_attention(), remat="some")


def test_bfloat16_compute_with_float32_parameters():
    decoder = decoder_with_noise()
    hidden, _ = jax.eval_shape(lambda: decoder.hidden(TOKENS, POSITIONS, dense_attention(), compute_dtype=jnp.bfloat16))
    assert hidden.dtype == jnp.bfloat16
    logits = logits_of(decoder, compute_dtype=jnp.bfloat16)
    assert logits.dtype == jnp.float32
    exact = logits_of(decoder)
    assert 0 < np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


def test_the_cache_passes_every_layer_in_order():
    def attend(q, k, v, layer, cache):
        out, _ = dense_attention()(q, k, v, layer, None)
        return out, cache.at[layer.index].set(layer.window)

    _, cache = decoder_with_noise()(TOKENS, POSITIONS, attend, jnp.zeros(3, jnp.int32))
    assert cache.tolist() == [2**30, 4, 2**30]


def test_adapters_equal_merged_weights():
    plain = logits_of(decoder_with_noise())
    decoder = with_adapters(decoder_with_noise(), some_modules)
    assert len(jax.tree.leaves(nnx.state(decoder, LoraParam))) == 6
    ids = jnp.broadcast_to(jnp.array([[0], [2]]), (2, 8))
    mixed = logits_of(decoder, adapter_ids=ids)
    default = logits_of(decoder)

    for adapter, found in ((0, mixed[0]), (2, mixed[1]), (1, default[0])):
        merged = decoder_with_noise()
        for target, source in zip(some_modules(merged), some_modules(decoder)):
            a, b = (np.asarray(x.get_value())[:, adapter] for x in (source.lora.a, source.lora.b))
            target.kernel.set_value(jnp.asarray(target.kernel.get_value() + 0.1 * np.einsum("lir,lro->lio", a, b)))
        row = 1 if adapter == 2 else 0
        np.testing.assert_allclose(found, logits_of(merged)[row], atol=1e-4)
    np.testing.assert_array_equal(mixed[0], plain[0])
    assert np.abs(mixed[1] - plain[1]).max() > 0.1


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_serving_layout_gives_the_same_logits(pack, tied):
    decoder = decoder_with_noise(dataclasses.replace(CONFIG, tie_word_embeddings=tied))
    expected = logits_of(decoder)
    fused = fuse_for_serving(decoder, pack=pack)
    np.testing.assert_allclose(logits_of(fused), expected, atol=2e-5)
    np.testing.assert_array_equal(logits_of(decoder), expected)  # the original is still whole

    attention = fused.layers.self_attn
    assert attention.q_proj is attention.k_proj is attention.v_proj is None
    assert isinstance(attention.qkv_proj.kernel.get_value(), PackedWeight if pack else StackedWeight)
    assert (fused.lm_head is None) == (tied and not pack)

    fuse_for_serving(decoder, pack=pack, consume=True)
    np.testing.assert_allclose(logits_of(decoder), expected, atol=2e-5)
    with pytest.raises(UserError, match="already"):
        fuse_for_serving(decoder, pack=pack)


def test_bfloat16_packed_weights_give_the_logits_of_plain_ones():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    decoder = decoder_with_noise(config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), nnx.state(decoder))
    nnx.update(decoder, half)
    wide = decoder_with_noise(config)
    nnx.update(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half))
    expected, plain = logits_of(wide), logits_of(decoder)
    found = logits_of(fuse_for_serving(decoder, pack=True, dtype=jnp.bfloat16))
    assert found.dtype == jnp.float32
    # Both lose what activations in bfloat16 lose; the packed form rounds less often.
    assert np.abs(found - expected).mean() <= 1.05 * np.abs(plain - expected).mean()


def test_adapters_are_not_fused():
    with pytest.raises(UserError, match="LoRA"):
        fuse_for_serving(with_adapters(decoder_with_noise(), some_modules), pack=False)


def test_packed_weights_are_not_copied_out_of_the_stack():
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=1024, vocab_size=8, layer_windows=())
    fused = fuse_for_serving(decoder_with_noise(config), pack=True, consume=True)
    graphdef, state = nnx.split(fused)
    step = jax.jit(lambda state, t: nnx.merge(graphdef, state)(t, t, dense_attention())[0])
    memory = step.lower(state, jnp.zeros(4, jnp.int32)).compile().memory_analysis()
    one_layer_bytes = 4 * 3 * 256 * 1024
    assert memory.temp_size_in_bytes < one_layer_bytes / 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads: found 3, expected a divisor of num_heads = 4"),
        ({"head_dim": 7}, "head_dim: found 7, expected an even number"),
        ({"vocab_size": 0}, "vocab_size: found 0, expected a positive integer"),
        ({"hidden_size": -1}, "hidden_size: found -1"),
        ({"num_layers": True}, "num_layers: found True"),
        ({"intermediate_size": 1.5}, "intermediate_size: found 1.5"),
        ({"max_position_embeddings": 0}, "max_position_embeddings: found 0"),
        ({"layer_windows": (None,)}, "layer_windows: found 1 entries, expected one a layer, 3"),
        ({"layer_windows": (None, 0, None)}, "layer_windows: found 0"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: found 0.0"),
        ({"activation": "relu"}, "activation: found 'relu', expected one of silu, gelu_tanh"),
        ({"logits_softcap": 0.0}, "logits_softcap: found 0.0, expected a positive number"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar: found -1"),
        (
            {"local_rope": RopeConfig(partial_rotary_factor=0.5)},
            "local_rope.partial_rotary_factor: expected that of rope",
        ),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: found 'small'"),
        ({"initializer_range": float("nan")}, "initializer_range: found nan"),
        ({"eos_token_ids": (1, -1)}, "eos_token_ids: found -1, expected token ids >= 0"),
    ],
)
def test_bad_configurations_get_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        dataclasses.replace(CONFIG, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"rope_type": "dynamic"},
            "rope.rope_type: found 'dynamic', expected one of default, linear, llama3, yarn, longrope",
        ),
        ({"theta": 0.0}, "rope.theta: found 0.0"),
        ({"rope_type": "linear", "factor": 0.5}, "rope.factor: found 0.5"),
        ({"rope_type": "yarn"}, "rope.original_max_position_embeddings: found None"),
        ({"low_freq_factor": 4.0}, "low_freq_factor, high_freq_factor: found 4.0, 4.0"),
        ({"beta_fast": 0.5}, "beta_slow, beta_fast: found 1.0, 0.5"),
        ({"attention_factor": 0.0}, "rope.attention_factor: found 0.0"),
        ({"partial_rotary_factor": 1.5}, "rope.partial_rotary_factor: found 1.5"),
        ({"short_factor": (1.0,)}, "rope.short_factor: found 1 factors with rope_type 'default', expected"),
        (
            {"rope_type": "longrope", "original_max_position_embeddings": 8, "short_factor": (1.0,)},
            "rope.long_factor: found 0 factors with rope_type 'longrope', expected one for each rotated pair",
        ),
        (
            {
                "rope_type": "longrope",
                "original_max_position_embeddings": 8,
                "short_factor": (1.0,),
                "long_factor": (-1.0,),
            },
            r"rope.long_factor: found (-1.0,), expected positive numbers",
        ),
    ],
)
def test_bad_rope_gets_one_line(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        RopeConfig(**values)


def test_rotation_of_part_of_a_head_and_longrope_by_length():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2, 12), np.float32))
    positions = jnp.arange(6)
    half = RopeConfig(partial_rotary_factor=0.5)
    turned = rotate(x, *rotation(positions, half, 12))
    np.testing.assert_array_equal(turned[..., 6:], x[..., 6:])
    np.testing.assert_array_equal(turned[..., :6], rotate(x[..., :6], *rotation(positions, RopeConfig(), 6)))

    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 5, "attention_factor": 1.0}
    both = RopeConfig(**scaling, short_factor=(1.0,) * 6, long_factor=(2.0,) * 6)
    plain, slow = (rotation(p, RopeConfig(), 12) for p in (positions, positions / 2))
    for longest, expected in ((5, plain), (6, slow)):
        for rope in (both, both.for_context(longest)):
            for found, wanted in zip(rotation(positions[:longest], rope, 12), expected):
                np.testing.assert_allclose(found, wanted[:longest], rtol=1e-6)
    # A fixed choice holds for pieces of the sequence too.
    np.testing.assert_allclose(rotation(positions[:2], both.for_context(6), 12)[0], slow[0][:2], rtol=1e-6)
    with pytest.raises(UserError, match=r"rope\.short_factor: found 6 factors, expected one a rotated pair, 4"):
        rotation(positions, both, 8)
    with pytest.raises(
        UserError, match=r"rope\.partial_rotary_factor: found 0\.25, 3 of 12 features, expected an even"
    ):
        rotation(positions, RopeConfig(partial_rotary_factor=0.25), 12)
