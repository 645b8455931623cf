"""Training over a mesh of devices, on eight that this host pretends to have."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_decoder import CONFIG, examples

from jaxstack.runtime.errors import UserError
from jaxstack.training import MeshConfig, SftConfig, train_sft
from jaxstack.training.sharding import RULES, logical_axes


def on_eight_devices(part: str, cache: Path, folder: Path, timeout_s: float) -> None:
    """Runs a part of `sharding_check.py`; TimeoutExpired if it hangs."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        # A thread that waits for other devices is taken; with too few, all would wait.
        "NPROC": "256",
        # No optimisation of programs that run once.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true --xla_cpu_collective_call_terminate_timeout_seconds=240 "
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=120",
    }
    program = str(Path(__file__).with_name("sharding_check.py"))
    command = [sys.executable, "-W", "error", program, part, str(cache), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == (["gradients"] if part == "all axes" else ["gradients", "full", "lora"])
    assert "rematerialization" not in done.stderr  # of a layout that the partitioner could not follow


def test_eight_devices_on_one_axis_compute_what_one_does(compiled_programs, tmp_path):
    on_eight_devices("one axis", compiled_programs, tmp_path, 280)


def test_eight_devices_on_three_axes_compute_what_one_does(compiled_programs, tmp_path):
    """XLA's CPU backend takes sums over different groups of devices in no fixed order, so that two devices may wait for
    each other, each in another sum. That is not what is tested, and may happen now and then.
    """
    for _ in range(3):
        try:
            return on_eight_devices("all axes", compiled_programs, tmp_path, 120)
        except subprocess.TimeoutExpired:
            continue
    pytest.fail("three times out of three the devices waited for each other")


@pytest.mark.parametrize(
    "name,ndim,axes",
    [
        ("embed.embedding", 2, ("vocab", "embed")),
        ("lm_head.kernel", 2, ("embed", "vocab")),
        ("lm_head.lora.a", 3, ("adapter", "embed", "rank")),
        ("layers.self_attn.k_proj.kernel", 3, ("layer", "embed", "kv")),
        ("layers.self_attn.o_proj.bias", 2, ("layer", "embed")),
        ("layers.self_attn.o_proj.lora.a", 4, ("layer", "adapter", "heads", "rank")),
        ("layers.self_attn.o_proj.lora.b", 4, ("layer", "adapter", "rank", "embed")),
        ("layers.self_attn.o_proj.lora.scale", 2, ("layer", "adapter")),
        ("layers.self_attn.q_norm.weight", 2, ("layer", None)),
        ("layers.moe.router.kernel", 3, ("layer", "embed", "expert")),
        ("layers.moe.down_proj.kernel", 4, ("layer", "expert", "mlp", "embed")),
        ("final_norm.weight", 1, (None,)),
    ],
)
def test_names_of_axes(name, ndim, axes):
    assert logical_axes(name, ndim) == axes
    assert {axis for axis in axes if axis} <= RULES.keys()


def config(**fields) -> SftConfig:
    return SftConfig(**{"model": CONFIG, "seq_len": 32, "max_steps": 2, **fields})


def test_refusals(tmp_path):
    with pytest.raises(UserError, match=r"batch_rows=6: expected a multiple of mesh\.data \* mesh\.fsdp = 4"):
        config(batch_rows=6, mesh=MeshConfig(data=2, fsdp=2))
    with pytest.raises(UserError, match=r"chunk_tokens=130: expected a multiple of mesh\.data \* mesh\.fsdp = 4"):
        config(chunk_tokens=130, mesh=MeshConfig(fsdp=4))
    for value in (0, True, 1.5):
        with pytest.raises(UserError, match=rf"mesh\.tensor={value!r}: expected an integer of at least 1"):
            MeshConfig(tensor=value)
    many = len(jax.devices()) + 1
    with pytest.raises(UserError, match=rf"data 1 x fsdp 1 x tensor {many} asks for {many} devices, found {many - 1}"):
        train_sft(config(mesh=MeshConfig(tensor=many)), tmp_path, examples=examples(9), progress=False)
