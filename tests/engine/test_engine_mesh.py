"""One engine over several devices, on eight that this host pretends to have."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxstack.engine import EngineConfig
from jaxstack.engine.config import sizes
from jaxstack.models import DecoderConfig
from jaxstack.runtime.errors import UserError


def test_meshes_answer_as_one_device_does(compiled_programs, tmp_path):
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false "
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true",
    }
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("mesh_check.py"))]
    done = subprocess.run(
        [*command, str(compiled_programs), str(tmp_path / "adapter")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["2", "8"]


MODEL = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_layers": 1,
    "num_heads": 6,
    "num_kv_heads": 3,
    "head_dim": 8,
}


@pytest.mark.parametrize(
    "axes,shape,change,message",
    [
        (("data", "model"), (1, 1), {}, r"found axes \('data', 'model'\), expected one called 'tensor'"),
        (("data", "tensor"), (2, 1), {}, r"found 2 devices on axis 'data', expected 1"),
        (("data", "tensor"), (1, 4), {}, r"found num_heads = 6, expected a multiple of 4 devices"),
        (("tensor",), (2,), {}, r"found num_kv_heads = 3, expected a multiple or a divisor of 2 devices"),
        (("tensor",), (3,), {"intermediate_size": 25}, r"found intermediate_size = 25, expected a multiple of 3"),
    ],
)
def test_refusals(axes, shape, change, message):
    device = jax.devices()[0]
    mesh = Mesh(np.full(shape, device, object), axes)
    with pytest.raises(UserError, match=message):
        sizes(EngineConfig(mesh=mesh), DecoderConfig(**MODEL | change), 4)
