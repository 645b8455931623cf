"""Llama-2-7B for chat: eight short requests a second on four types of accelerator, by their data sheets.

python -m launch.allocate --config=configs/allocation/example.py --config.rate_rps=20 --config.caps=A100-80GB=1
"""

from jaxstack.fleet.plan_job import PlanConfig


def get_config() -> PlanConfig:
    return PlanConfig()
