"""Lowering for accelerators that are not there: catches primitives and shapes that a Pallas back end does not take.

Triton's programs are verified, too. Lowering stops before Triton's and Mosaic's own compilers, so limits of registers
and on-chip memory are not seen.
"""

import contextlib

import jax
from jax._src.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

DEVICES = {
    "h100": AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"),
    "v4": AbstractDevice(device_kind="TPU v4", num_cores=2, platform="tpu"),
    "v5e": AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    "v6e": AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu"),
}
GPUS = ["h100"]
TPUS = ["v4", "v5e", "v6e"]
# The custom call that a Pallas kernel becomes.
TRITON, TPU = "__gpu$xla.gpu.triton", "tpu_custom_call"


@contextlib.contextmanager
def tracing_for(device: str):
    """Inside, programs are traced as for one of DEVICES, so `kernels.platforms` decides as it would there."""
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=DEVICES[device])
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def lowered_text(function, *arguments, device: str) -> str:
    """The StableHLO of `function` for one of DEVICES; `arguments` may be `jax.ShapeDtypeStruct`s."""
    target = {"gpu": "cuda", "tpu": "tpu"}[DEVICES[device].platform]
    with tracing_for(device):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(target,))
    for program in _triton_programs(lowered.compiler_ir("stablehlo").operation):
        with mlir.make_ir_context() as context:
            triton_dialect.register_dialect(context)
            ir.Module.parse(program)  # raises where an operation gets what it does not take
    return lowered.as_text()


def _triton_programs(operation):
    """The modules that Pallas gives to Triton, as bytecode, of all calls inside an operation."""
    for inner in (o for region in operation.regions for block in region for o in block):
        if inner.operation.name == "stablehlo.custom_call" and inner.attributes["call_target_name"].value == TRITON:
            yield inner.attributes["mhlo.backend_config"]["ir"].value_bytes
        yield from _triton_programs(inner.operation)
