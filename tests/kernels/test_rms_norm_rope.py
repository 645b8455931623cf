"""Head norms and rotation: every implementation against float64."""

import functools

import jax
import jax.numpy as jnp
import lowering
import numpy as np
import pytest

from kernels.rms_norm_rope import pallas_tpu, rms_norm_rope

# (rows, heads, kv heads, head_dim, rotated)
SHAPES = [(13, 3, 1, 16, 16), (5, 2, 2, 20, 12), (9, 2, 1, 128, 128)]


def made(shape, normed, dtype=jnp.float32):
    rows, heads, kv_heads, head_dim, rotated = shape
    rng = np.random.default_rng(rows)
    angles = rng.uniform(0, 7, size=(rows, rotated // 2))
    arrays = [rng.normal(size=(rows, n, head_dim)) * 3 for n in (heads, kv_heads)]
    weights = [rng.uniform(0.5, 1.5, head_dim) for _ in range(2)]
    arrays = [jnp.asarray(a, dtype) for a in arrays] + [jnp.asarray(f(angles), jnp.float32) for f in (np.cos, np.sin)]
    return arrays + ([jnp.asarray(w, dtype) for w in weights] if normed else [None, None])


def expected(q, k, cos, sin, q_weight, k_weight, offset):
    def one(x, weight):
        x = np.asarray(x, np.float64)
        if weight is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (np.asarray(weight, np.float64) + offset)
        half = cos.shape[-1]
        # As multiplication of complex numbers.
        turned = (x[..., :half] + 1j * x[..., half : 2 * half]) * (np.asarray(cos) + 1j * np.asarray(sin))[:, None]
        return np.concatenate([turned.real, turned.imag, x[..., 2 * half :]], -1)

    return one(q, q_weight), one(k, k_weight)


def run(form, arrays, offset):
    if form == "interpret tpu":
        call = functools.partial(pallas_tpu.rms_norm_rope, interpret=True)
    else:
        call = functools.partial(rms_norm_rope, implementation=form)
    return jax.jit(functools.partial(call, eps=1e-5, offset=offset))(*arrays)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", ["ref", "xla", "interpret", "interpret tpu"])
def test_equals_float64(form, shape, monkeypatch):
    if form == "interpret tpu" and shape[3] != 128:
        pytest.skip("whole lines of lanes only")
    monkeypatch.setattr(pallas_tpu, "rows_for", lambda *_: 8)
    for normed, offset in [(False, False), (True, False), (True, True)]:
        arrays = made(shape, normed)
        for found, wanted in zip(run(form, arrays, offset), expected(*arrays, offset)):
            np.testing.assert_allclose(found, wanted, atol=2e-5)


@pytest.mark.parametrize("form", ["xla", "interpret", "interpret tpu"])
def test_bfloat16(form):
    for offset in (False, True):
        arrays = made(SHAPES[2], True, jnp.bfloat16)
        for found, wanted in zip(run(form, arrays, offset), run("ref", arrays, offset)):
            assert found.dtype == jnp.bfloat16
            found, wanted = (np.asarray(v, np.float32) for v in (found, wanted))
            np.testing.assert_allclose(found, wanted, rtol=2**-7, atol=0.02)


def test_leading_axes_and_gradients():
    q, k, cos, sin, q_weight, k_weight = made((6, 2, 1, 16, 16), True)
    q, k, cos, sin = (v.reshape(2, 3, *v.shape[1:]) for v in (q, k, cos, sin))

    def gradients(form):
        def total(q, k, q_weight, k_weight):
            a, b = rms_norm_rope(q, k, cos, sin, q_weight, k_weight, implementation=form)
            return jnp.sin(a).sum() + jnp.cos(b).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(q, k, q_weight, k_weight)

    wanted = jax.tree.leaves(gradients("ref"))
    for form in ("xla", "interpret"):
        for a, b in zip(jax.tree.leaves(gradients(form)), wanted):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", [*lowering.GPUS, *lowering.TPUS])
def test_lowers_for_accelerators(device):
    # Llama 3 8B; Qwen3 0.6B; a head size that the TPU's kernel refuses.
    for rows, heads, kv_heads, head_dim, normed in [
        (64, 32, 8, 128, False),
        (2048, 16, 8, 128, True),
        (7, 14, 2, 80, True),
    ]:
        shaped = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
        arrays = [shaped(rows, heads, head_dim), shaped(rows, kv_heads, head_dim)]
        arrays += [shaped(rows, head_dim // 2, dtype=jnp.float32)] * 2
        arrays += [shaped(head_dim)] * 2 if normed else []
        text = lowering.lowered_text(rms_norm_rope, *arrays, device=device)
        if device in lowering.GPUS:
            assert lowering.TRITON in text
        else:
            assert (lowering.TPU in text) == (head_dim == 128)


def test_what_does_not_fit_is_named():
    q, k, cos, sin, weight, _ = made(SHAPES[0], True)
    with pytest.raises(ValueError, match="do not fit each other"):
        rms_norm_rope(q, k[1:], cos, sin)
    with pytest.raises(ValueError, match="at most 8 features"):
        rms_norm_rope(q, k, jnp.ones((13, 9)), jnp.ones((13, 9)))
    with pytest.raises(ValueError, match="both or neither"):
        rms_norm_rope(q, k, cos, sin, weight)
    with pytest.raises(ValueError, match="k_weight of shape"):
        rms_norm_rope(q, k, cos, sin, weight, weight[1:])
    with lowering.tracing_for("v5e"), pytest.raises(ValueError, match="expected a multiple of 128, all of it"):
        rms_norm_rope(q, k, cos, sin, implementation="pallas_tpu")
