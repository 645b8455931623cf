"""Run with eight host devices by `test_training_sharding.py`: training over a mesh is training on one device."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from tiny_decoder import CONFIG, decoder, examples

from jaxstack.models import lora
from jaxstack.runtime.compilation import use_compilation_cache
from jaxstack.training import DataConfig, LoraConfig, MeshConfig, OptimizerConfig, SftConfig, train_sft
from jaxstack.training.data import build_dataset
from jaxstack.training.losses import cross_entropy
from jaxstack.training.packing import PackedBatches, Place
from jaxstack.training.sharding import Layout
from jaxstack.training.step import decoder_loss, loss_gradients, split_model

# Every cut axis is a multiple of 8 but the vocabulary, 61, which stays whole.
MODEL = dataclasses.replace(
    CONFIG, num_heads=8, num_kv_heads=2, qkv_bias=True, attention_out_bias=True, initializer_range=0.1
)
ROWS = examples(60, seed=3)
MESHES = (MeshConfig(data=8), MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2))
ONE_AXIS, ALL_AXES = MESHES[:2], MESHES[2:]


def batch():
    data = build_dataset(
        ((str(i), row) for i, row in enumerate(ROWS)), None, DataConfig(), row_length=32, vocab_size=61
    )
    return PackedBatches(data, row_count=16, row_length=32).batch(Place())


def gradients(mesh: MeshConfig, **options):
    """Loss, gradients of the model and of its adapters as the step has them, and the parameters laid out."""
    model = decoder(MODEL)
    lora.attach(model, LoraConfig(r=4))
    for site in lora.sites(model):  # B is zero at first, and A's gradient with it
        if site.linear.lora is not None:
            b = site.linear.lora.b
            b.set_value(0.3 * np.random.default_rng(5).standard_normal(b.get_value().shape, np.float32))
    split, params, frozen = split_model(model, nnx.Param)
    layout = Layout(mesh, MODEL, {**params, **frozen})
    params, frozen = layout.put(params), layout.put(frozen)
    accum = options.pop("accum_steps", 1)
    loss = decoder_loss(cross_entropy, layout=layout, **options)
    run = jax.jit(lambda p, f, b: loss_gradients(split, loss, p, f, b, accum, layout))
    parts, grads = run(params, frozen, layout.put_batch(batch()))
    for name, gradient in grads.items():  # where the parameter lies, and as large a part of it
        assert gradient.sharding.is_equivalent_to(params[name].sharding, gradient.ndim), name
    return float(parts.num / parts.den), jax.device_get(grads), {**params, **frozen}


def check_gradients(meshes: tuple[MeshConfig, ...]) -> None:
    ways = {  # accumulation, chunked logits and recomputation each in one of the meshes
        MESHES[0]: {"accum_steps": 2},
        MESHES[1]: {"remat": "dots"},
        MESHES[2]: {"chunk_tokens": 128, "accum_steps": 2},
    }
    loss, grads, _ = gradients(MeshConfig())
    for kind in ("mlp.up_proj.kernel", "mlp.up_proj.lora.a", "mlp.up_proj.lora.b"):
        assert np.abs(grads[f"layers.{kind}"]).max() > 1e-3
    for mesh in meshes:
        ours, theirs, placed = gradients(mesh, **ways[mesh])
        assert abs(ours - loss) < 1e-5 * abs(loss), (mesh, ours, loss)
        for name, gradient in grads.items():
            error = np.abs(theirs[name] - gradient).max() / max(1e-3, np.abs(gradient).max())
            assert error < 1e-5, (mesh, name, error)
        check_shares(mesh, placed)
    print("gradients", flush=True)


def check_shares(mesh: MeshConfig, placed) -> None:
    """Devices hold their shares, not copies."""

    def share(name: str) -> list[float]:
        whole = placed[name].shape
        return [part / all_ for part, all_ in zip(placed[name].addressable_shards[0].data.shape, whole)]

    fsdp, tensor = 1 / mesh.fsdp, 1 / mesh.tensor
    assert share("layers.self_attn.q_proj.kernel") == [1, fsdp, tensor]
    assert share("layers.self_attn.o_proj.kernel") == [1, tensor, fsdp]
    assert share("layers.mlp.up_proj.kernel") == [1, fsdp, tensor]
    assert share("layers.mlp.down_proj.kernel") == [1, tensor, fsdp]
    assert share("layers.self_attn.q_proj.bias") == [1, tensor]
    assert share("embed.embedding") == [1, fsdp]
    assert share("layers.input_layernorm.weight") == [1, 1]
    assert share("layers.mlp.up_proj.lora.a") == [1, 1, fsdp, 1]
    assert share("layers.mlp.up_proj.lora.b") == [1, 1, 1, tensor]
    assert share("layers.mlp.down_proj.lora.a") == [1, 1, tensor, 1]
    assert share("layers.mlp.down_proj.lora.b") == [1, 1, 1, fsdp]
    model = [p for name, p in placed.items() if "lora" not in name]
    everything, here = sum(p.nbytes for p in model), sum(p.addressable_shards[0].data.nbytes for p in model)
    assert here < everything / (mesh.fsdp * mesh.tensor) * 1.35, (mesh, here, everything)


def train(folder: Path, mesh: MeshConfig, steps: int, adapters: bool) -> list[float]:
    """The losses of all steps so far."""
    config = SftConfig(
        model=MODEL,
        mesh=mesh,
        lora=LoraConfig(r=4) if adapters else None,
        batch_rows=8,
        seq_len=32,
        max_steps=steps,
        log_every=1,
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    )
    result = train_sft(config, folder, examples=ROWS, progress=False)
    assert result.summary["recompilations"] == 0 and result.steps == steps
    assert (result.adapter_folder is not None) == adapters
    return [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").read_text().splitlines()]


def check_runs(folder: Path) -> None:
    """A run whose mesh changes at every start goes as one on a single device does.

    With one axis at a time: XLA's CPU backend takes sums over different groups of devices in no fixed order, and two
    devices may then wait for each other, each in another sum.
    """
    alone = train(folder / "alone", MeshConfig(), 6, adapters=False)
    for steps, mesh in ((2, MESHES[1]), (4, MeshConfig()), (6, MESHES[1])):
        wandering = train(folder / "wandering", mesh, steps, adapters=False)
    np.testing.assert_allclose(wandering, alone, rtol=1e-4)
    assert alone[-1] < 0.9 * alone[0]
    print("full", flush=True)
    alone = train(folder / "adapter", MeshConfig(), 4, adapters=True)
    np.testing.assert_allclose(train(folder / "adapter_8", MESHES[1], 4, adapters=True), alone, rtol=1e-4)
    print("lora", flush=True)


def main() -> None:
    part, cache, folder = sys.argv[1:]
    use_compilation_cache(Path(cache))
    assert len(jax.devices()) == 8
    check_gradients(ALL_AXES if part == "all axes" else ONE_AXIS)
    if part != "all axes":
        check_runs(Path(folder))


if __name__ == "__main__":
    main()
