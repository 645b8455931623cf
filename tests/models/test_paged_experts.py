"""Feed-forward weights in pages compute what they compute in one piece, however they are cut."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.models import DecoderConfig, MoeConfig, paged_experts
from jaxstack.models.decoder import MLP
from jaxstack.models.moe import Moe
from jaxstack.models.paged_experts import ExpertPage, PageLayout, choose_layouts, paged_mlp, paged_moe


def config(**more) -> DecoderConfig:
    return DecoderConfig(
        architecture="MixtralForCausalLM",
        vocab_size=8,
        hidden_size=24,
        intermediate_size=96,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        initializer_range=0.4,
        **more,
    )


MOE = config(moe=MoeConfig(num_experts=6, experts_per_token=2, intermediate_size=48))


def pages_of(layout: PageLayout, gate, up, down) -> list[ExpertPage]:
    out = []
    for page in range(layout.pages):
        (g, u), d = layout.cut(gate, up, down, page)
        out.append(ExpertPage(jnp.concatenate([g, u], axis=-1), jnp.asarray(d)))
        assert (out[-1].gate_up.shape, out[-1].down.shape) == tuple(layout.shapes)
    return out


@pytest.mark.parametrize("form", ["sorted", "every row"])
@pytest.mark.parametrize(("group", "chunks"), [(1, 1), (1, 3), (2, 1), (6, 1)])
def test_experts_in_pages(form, group, chunks, monkeypatch):
    monkeypatch.setattr(paged_experts, "_FREE_ROWS_CPU", 0 if form == "sorted" else 16)
    moe = Moe(MOE, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((11, 24), np.float32))
    layout = PageLayout(24, 48, 6, group, chunks)
    stacks = [np.asarray(part.kernel.get_value()) for part in (moe.gate_proj, moe.up_proj, moe.down_proj)]
    out = paged_moe(x, moe.router, pages_of(layout, *stacks), layout, MOE.moe, "silu")
    np.testing.assert_allclose(out, moe(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_plain_mlp_in_pages(chunks):
    mlp = MLP(config(), rngs=nnx.Rngs(1), param_dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 24), np.float32))
    layout = PageLayout(24, 96, 1, 1, chunks)
    stacks = [np.asarray(part.kernel.get_value())[None] for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    out = paged_mlp(x, pages_of(layout, *stacks), layout, "silu")
    np.testing.assert_allclose(out, mlp(x), rtol=1e-5, atol=1e-5)


def test_rows_of_nobody_may_hold_anything():
    """Where every expert is given every row, an infinite value in a row that did not choose it stays out."""
    moe = Moe(MOE, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 24), np.float32))
    layout = PageLayout(24, 48, 6)
    stacks = [np.asarray(part.kernel.get_value()) for part in (moe.gate_proj, moe.up_proj, moe.down_proj)]
    scores = np.asarray(moe.router(x))
    unchosen = int(scores.max(axis=0).argmin())
    chosen = np.argsort(-scores, axis=-1)[:, :2]
    assert unchosen not in chosen
    stacks[2] = stacks[2].copy()
    stacks[2][unchosen] = np.inf
    out = paged_moe(x, moe.router, pages_of(layout, *stacks), layout, MOE.moe, "silu")
    assert np.isfinite(np.asarray(out)).all()


def test_layouts_have_about_the_pages_asked_for():
    layouts = choose_layouts(config(moe=MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=14336)), 8)
    assert layouts == {True: PageLayout(24, 14336, 8, 1, 1)}
    layouts = choose_layouts(config(moe=MoeConfig(num_experts=8, experts_per_token=2, intermediate_size=14336)), 14)
    assert layouts[True].pages == 16 and layouts[True].chunks == 2
    layouts = choose_layouts(config(moe=MoeConfig(num_experts=128, experts_per_token=8, intermediate_size=768)), 8)
    assert layouts[True].pages == 8 and layouts[True].experts_per_page == 16
    mixed = config(moe=MoeConfig(num_experts=6, experts_per_token=2, intermediate_size=48, dense_layers=(1,)))
    assert {kind: layout.pages for kind, layout in choose_layouts(mixed, 8).items()} == {False: 8, True: 12}
    with pytest.raises(ValueError, match="whole pages"):
        PageLayout(24, 96, 5, 2)
