"""The paper's end-to-end run: service files for clouds, and what a day of each is expected to cost.

Llama-2-70B on 8 A10G a replica (g5.48xlarge) in three regions, as in section 6 of the paper: three replicas, one extra,
24 hours. Nothing is started here: the files are for `launch.fleet up --provisioner=skypilot`, or for `sky serve up`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxstack.fleet.controller import load_service
from jaxstack.fleet.spot.evaluation import POLICIES, synthetic_windows
from jaxstack.fleet.spot.simulator import simulate
from jaxstack.fleet.spot.traces import region_of
from jaxstack.fleet.spot.view import ZonePrice
from jaxstack.runtime.metrics import write_atomically, write_summary

ON_DEMAND_USD = 16.288
SPOT_USD: Mapping[str, float] = {"us-east-2": 2.71, "us-west-2": 4.78, "eu-central-1": 6.84}
"""Of a g5.48xlarge, an hour: from the cheapest to the dearest that the authors met; the middle one is in between."""
REPLICAS, EXTRA, HOURS = 3, 1, 24.0
COLD_START_S = 180.0
"""Assumed, for an instance to boot and load 140 GB; the run itself will tell."""


def service(*, spot: bool) -> dict[str, Any]:
    """A service file, as an object."""
    policy: dict[str, Any] = {
        "min_replicas": 0,
        "max_replicas": REPLICAS,
        "target_qps_per_replica": 0.2,
    }
    if spot:
        policy |= {"num_overprovision": EXTRA, "dynamic_ondemand_fallback": True, "spot_placer": "dynamic_fallback"}
    return {
        "name": "spothedge" if spot else "on-demand",
        "service": {
            "readiness_probe": {"path": "/health", "initial_delay_seconds": 1200},
            "replica_policy": policy,
            "load_balancing_policy": "least_load",
        },
        "resources": {
            "accelerators": "A10G:8",
            "use_spot": spot,
            "ports": 8000,
            "any_of": [{"cloud": "aws", "region": region} for region in SPOT_USD],
        },
        "setup": "pip install 'jaxstack[gpu]'",
        "run": "python -m launch.serve --model=$MODEL --host=0.0.0.0 --port=8000 --trust_client_id",
        "envs": {"MODEL": "meta-llama/Llama-2-70b-chat-hf"},
    }


def run(workdir: Path) -> dict[str, Any]:
    """Writes the files; returns what to expect and how to start. JSON-ready."""
    files = {}
    for spot in (True, False):
        content = service(spot=spot)
        file = workdir / f"{content['name']}.yaml"
        write_atomically(file, yaml.safe_dump(content, sort_keys=False))
        load_service(file)  # what we write, we must be able to read
        files[content["name"]] = str(file)
    summary = {
        "expected": {name: expected(name) for name in ("ours", "spot_pool", "scaling_group", "on_demand")},
        "prices_usd_per_hour": {"on_demand": ON_DEMAND_USD, "spot": dict(SPOT_USD)},
        "files": files,
        "start": [f"python -m launch.fleet up {file} --provisioner=skypilot" for file in files.values()],
    }
    write_summary(workdir, summary)
    return summary


def expected(policy: str) -> dict[str, float]:
    """Of a day, over ten made-up days of the second set, whose three zones stand for the three regions."""
    days = []
    for trace in synthetic_windows("aws2", 10, duration_s=3600 * HOURS):
        spot = dict(zip(trace.zones, SPOT_USD.values()))
        prices = {zone: ZonePrice(price, ON_DEMAND_USD, region_of(zone)) for zone, price in spot.items()}
        priced = dataclasses.replace(trace, prices=prices)
        made = POLICIES[policy](priced, REPLICAS, EXTRA)
        days.append(simulate(priced, made, cold_start_s=COLD_START_S))
    dollars = [float(day.bill_usd_per_hour.mean()) * HOURS for day in days]
    return {
        "usd": round(float(np.mean(dollars)), 2),
        "usd_lowest": round(min(dollars), 2),
        "usd_highest": round(max(dollars), 2),
        "availability": round(float(np.mean([day.availability for day in days])), 4),
    }
