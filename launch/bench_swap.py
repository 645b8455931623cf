"""What swapping keys and values costs and brings on this device: decode steps of a model of random weights, with a pool
for keys and values that is capped.

    python -m launch.bench_swap                       Llama-3-8B's shape on a GPU, 0.75 GB, half of it on the host
    python -m launch.bench_swap --shape=tiny          small, on a CPU
    python -m launch.bench_swap --check               only that the tokens are right

Prints the throughput over that without swapping, what the host takes to launch a step, and the share of the transfers
that hides behind computing: the steps are compared with those of as many sequences with everything on the device.
"""

import dataclasses
import json
import sys
from typing import Any

from absl import flags

from launch import job
from launch.pie_study.accelerator import SHAPES, AcceleratorConfig, check, decision, measure

_DEFAULT = AcceleratorConfig()
_SHAPE: Any = flags.DEFINE_enum("shape", None, sorted(SHAPES), "of the model; by default Llama-3-8B's, tiny on a CPU")
_KV_GB = flags.DEFINE_float("kv_gb", None, "of the device, for keys and values", lower_bound=1e-4)
_SHARE = flags.DEFINE_float(
    "share", _DEFAULT.share, "of keys and values on the host", lower_bound=0.0, upper_bound=0.97
)
_CONTEXT = flags.DEFINE_integer(
    "context_pages", _DEFAULT.context_pages, "pages of 16 tokens of a sequence", lower_bound=4
)
_STEPS = flags.DEFINE_integer("steps", _DEFAULT.steps, "that are timed", lower_bound=2)
_HOST_GB = flags.DEFINE_float("host_gb", _DEFAULT.host_bytes / 1e9, "of the host, for keys and values")
_LAYERS = flags.DEFINE_integer(
    "layers_per_program", None, "layers that are launched together; by default as the engine chooses", lower_bound=1
)
_BUDGET = flags.DEFINE_float("budget_s", _DEFAULT.budget_s, "nothing more is begun after so long")
_CHECK = flags.DEFINE_bool("check", False, "only compare tokens")


def run() -> dict[str, Any]:
    import jax

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    small = jax.default_backend() == "cpu"
    shape = _SHAPE.value or ("tiny" if small else _DEFAULT.shape)
    kv_bytes = int(1e9 * (_KV_GB.value or (0.004 if shape == "tiny" else _DEFAULT.kv_bytes / 1e9)))
    config = AcceleratorConfig(
        shape,
        kv_bytes,
        _SHARE.value,
        _CONTEXT.value,
        _STEPS.value,
        int(1e9 * _HOST_GB.value),
        _BUDGET.value,
        _LAYERS.value,
    )
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind, "config": dataclasses.asdict(config)}
    found["check"] = check(say)
    if _CHECK.value or not found["check"]["tokens_equal"]:
        return found
    found["decision"] = decision(config)
    say(found["decision"])
    found |= measure(config, say)
    return json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 5))


if __name__ == "__main__":
    job.main(run)
