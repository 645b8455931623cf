"""Adapters in the slots of a serving decoder: the numbers of the merged model, in every layout, and refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.models import Decoder, DecoderConfig, dense_attention, lora
from jaxstack.models.adapter_slots import add_slots, slot_contents, slot_sites, write_slot
from jaxstack.models.linear import AdapterFactors
from jaxstack.models.peft_format import PeftAdapter, read_peft, save_peft
from jaxstack.models.serving_layout import fuse_for_serving
from jaxstack.runtime.errors import UserError

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
    initializer_range=0.2,
)
RANK = 4
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 61, (4, 9)))


@functools.cache
def weights():
    model, rng = Decoder.abstract(CONFIG), np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape, np.float32)), nnx.state(model))
    nnx.update(model, values)
    return nnx.split(model)


def fresh() -> Decoder:
    return nnx.merge(*weights())


@functools.cache
def adapters() -> tuple[PeftAdapter, ...]:
    """Three of different ranks, targets and scales, with random factors."""
    rng = np.random.default_rng(1)
    made = []
    for config in (
        lora.LoraConfig(r=2, alpha=3.0, alpha_pattern=(("v_proj", 5.0),)),
        lora.LoraConfig(r=RANK, targets=("q_proj", "up_proj", "down_proj"), use_rslora=True),
        lora.LoraConfig(r=1, targets=(r"model\.layers\.1\..*_proj",)),
    ):
        model = fresh()
        lora.attach(model, config)
        factors = {
            m: dataclasses.replace(f, b=0.2 * rng.normal(size=f.b.shape).astype(np.float32))
            for m, f in lora.adapter_factors(model, config).items()
        }
        made.append(PeftAdapter(config, factors, np.dtype(np.float32), {}))
    return tuple(made)


@functools.cache
def merged_logits(number: int | None):
    """Of the model with an adapter added to its weights."""
    model = fresh()
    if number is not None:
        lora.set_adapters(model, [adapters()[number].factors])
        model = lora.merge(model)
    return np.asarray(_logits(*nnx.split(model), TOKENS, jnp.zeros(TOKENS.shape, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, tokens, ids):
    decoder = nnx.merge(graph, state)
    return decoder(tokens, jnp.broadcast_to(jnp.arange(9), tokens.shape), dense_attention(), adapter_ids=ids)[0]


def with_adapters(decoder: Decoder) -> Decoder:
    """The three adapters in slots 3, 1, 2."""
    add_slots(decoder, 3, RANK, jnp.float32)
    sites = slot_sites(decoder)
    state = nnx.to_flat_state(nnx.state(decoder, AdapterFactors))
    order = {site.path: site for site in sites}
    values = [variable.get_value() for _, variable in state]
    for slot, adapter in zip((3, 1, 2), adapters()):
        contents = slot_contents(sites, adapter, RANK, jnp.float32, source="adapter")
        assert contents.keys() == order.keys()
        values = write_slot(values, slot, [contents[tuple(path[:-2])] for path, _ in state])
    nnx.update(decoder, nnx.from_flat_state([(p, v.replace(x)) for (p, v), x in zip(state, values)]))
    return decoder


@pytest.mark.parametrize("layout", ["plain", "fused", "packed"])
def test_mixed_rows_equal_the_merged_models(layout):
    decoder = fresh() if layout == "plain" else fuse_for_serving(fresh(), pack=layout == "packed")
    ids = jnp.broadcast_to(jnp.array([[1], [3], [0], [2]]), TOKENS.shape)
    found = _logits(*nnx.split(with_adapters(decoder)), TOKENS, ids)
    for row, number in enumerate((1, 0, None, 2)):
        expected = merged_logits(number)[row]
        np.testing.assert_allclose(found[row], expected, atol=2e-4)
        assert number is None or np.abs(expected - merged_logits(None)[row]).max() > 0.05


def test_rows_without_adapters_are_untouched_bit_for_bit():
    decoder = fuse_for_serving(fresh(), pack=False)
    ids = jnp.zeros(TOKENS.shape, jnp.int32)
    expected = _logits(*nnx.split(decoder), TOKENS, ids)
    np.testing.assert_array_equal(_logits(*nnx.split(with_adapters(decoder)), TOKENS, ids), expected)


def test_a_checkpoints_fused_projection_is_taken_apart():
    """As Phi-3's adapters have it: one A for q, k and v."""
    rng = np.random.default_rng(2)
    q, kv = 48, 24
    a, b = rng.normal(size=(32, 2)).astype(np.float32), rng.normal(size=(2, q + 2 * kv)).astype(np.float32)
    one = {"model.layers.1.self_attn.qkv_proj": lora.Factors(a, b, 0.5)}
    cut = {"q": b[:, :q], "k": b[:, q : q + kv], "v": b[:, q + kv :]}
    three = {f"model.layers.1.self_attn.{n}_proj": lora.Factors(a, part, 0.5) for n, part in cut.items()}
    sites = slot_sites(fresh())
    contents = [
        slot_contents(sites, PeftAdapter(lora.LoraConfig(), f, np.dtype(np.float32), {}), 2, jnp.float32, source="x")
        for f in (one, three)
    ]
    for path in contents[0]:
        for left, right in zip(jax.tree.leaves(contents[0][path]), jax.tree.leaves(contents[1][path])):
            np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(
    "config,change,message",
    [
        (lora.LoraConfig(r=5), {}, r"model\.layers\.0\.self_attn\.k_proj has rank 5, expected at most .* = 4"),
        (lora.LoraConfig(r=2, targets=("lm_head",)), {}, r"adapts 'lm_head', which takes no adapter here"),
        (
            lora.LoraConfig(r=2),
            {"hidden_size": 16},
            r"k_proj from 16 to 24 features, expected 32 to 24: .* another model",
        ),
    ],
)
def test_refusals(tmp_path, config, change, message):
    model = Decoder.abstract(dataclasses.replace(CONFIG, **change))
    lora.attach(model, config)
    save_peft(model, tmp_path / "adapter", config)
    adapter = read_peft(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        slot_contents(slot_sites(fresh()), adapter, RANK, jnp.float32, source=tmp_path)


def test_a_dora_is_refused_by_name():
    factors = lora.Factors(np.ones((32, 2), np.float32), np.ones((2, 48), np.float32), 1.0, np.ones(48, np.float32))
    adapter = PeftAdapter(
        lora.LoraConfig(use_dora=True), {"model.layers.0.self_attn.q_proj": factors}, np.dtype(np.float32), {}
    )
    with pytest.raises(UserError, match=r"^here: use_dora is true, which the slots of a server do not hold; expected"):
        slot_contents(slot_sites(fresh()), adapter, RANK, jnp.float32, source="here")
