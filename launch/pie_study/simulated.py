"""Simulated runs of a roofline engine that swaps, by name; each is a part of the study that is kept once it is done."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

from jaxstack.engine.memory.swap.capacity import CacheShape, Rates
from jaxstack.engine.memory.swap.config import Placement
from jaxstack.engine.memory.swap.sim import AdmissionRule, Job, Outcome, SimEngine, simulate, workload

MODELS: Mapping[str, CacheShape] = {
    "llama3_8b": CacheShape(layers=32, kv_bytes=4096, weight_bytes=16.1e9, parameters=8.03e9),
    "opt_13b": CacheShape(layers=40, kv_bytes=20480, weight_bytes=25.7e9, parameters=12.85e9),
}
GH200 = Rates(device_bytes_per_s=3.6e12, link_bytes_per_s=4.19e11, flops_per_s=5e14)
"""Of the profile gh200 in `jaxstack.runtime.machine`."""

KV_BYTES = 0.75e9
"""M of the reference setting: 5,722 tokens of Llama-3-8B."""

LINKS = (20e9, 50e9, 100e9, 200e9, 419e9)
RATES = (4.0, 8.0, 10.0, 12.0, 13.0)
LOAD_SEEDS = 4
DROP_S = (5.0, 25.0)
"""When the link of the run that shows it is slow."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One simulation. See `SimEngine` and `workload` for the fields; `share` None is the controller's.

    `slow_link_bytes_per_s`: the link's rate during `DROP_S`. `trace`: samples are wanted.
    """

    model: str = "llama3_8b"
    kv_bytes: float = KV_BYTES
    share: float | None = 0.0
    admission: AdmissionRule = "preempt"
    placement: Placement = "page_striped"
    seed: int = 0
    requests: int = 600
    per_second: float | None = None
    link_bytes_per_s: float = GH200.link_bytes_per_s
    slow_link_bytes_per_s: float | None = None
    layer_overhead_s: float = 0.0
    max_running: int = 1024
    all_on_host: bool = False
    trace: bool = False

    def outcome(self) -> Outcome:
        rates = dataclasses.replace(
            GH200, link_bytes_per_s=self.link_bytes_per_s, layer_overhead_s=self.layer_overhead_s
        )
        slow = self.slow_link_bytes_per_s
        engine = SimEngine(
            MODELS[self.model],
            rates,
            self.kv_bytes,
            share=self.share,
            admission=self.admission,
            placement=self.placement,
            max_running=self.max_running,
            all_on_host=self.all_on_host,
            link_bytes_per_s=None
            if slow is None
            else lambda now: slow if DROP_S[0] <= now < DROP_S[1] else self.link_bytes_per_s,
        )
        return simulate(engine, self.jobs(), sample_every=32 if self.trace else 1 << 30)

    def jobs(self) -> list[Job]:
        """Its requests."""
        return workload(self.requests, self.seed, per_second=self.per_second)


def simulate_run(run: Run) -> dict[str, Any]:
    """Its row, JSON-ready."""
    outcome = run.outcome()
    row: dict[str, Any] = {
        "rate": outcome.steady_rate,
        "stall": outcome.stall_share,
        "latency": outcome.latency,
        "latency_p99": outcome.latency_p99,
        "share": outcome.share,
        "tpot": outcome.tpot_s,
        "preemptions": outcome.preemptions,
    }
    if run.trace:
        row["samples"] = [[s.time_s, s.output_tokens, s.share, s.stall_s] for s in outcome.samples]
    return row


def smallest_pool(overhead_s: float) -> dict[str, Any]:
    """The smallest pool in which the controller keeps 99 % of the throughput of 58 GB without swapping: OPT-13B."""
    base = Run(model="opt_13b", kv_bytes=58e9, requests=1500, layer_overhead_s=overhead_s)
    wanted = 0.99 * base.outcome().steady_rate
    low, high = 20e9, base.kv_bytes
    while high - low > 0.5e9:
        middle = (low + high) / 2
        found = dataclasses.replace(base, kv_bytes=middle, share=None).outcome().steady_rate
        low, high = (low, middle) if found >= wanted else (middle, high)
    weights = MODELS["opt_13b"].weight_bytes
    return {"pool_bytes": high, "reduction": (weights + base.kv_bytes) / (weights + high)}


@dataclasses.dataclass(frozen=True)
class Pool:
    """A search for the smallest pool, in the place of a run."""

    layer_overhead_s: float


def run_part(what: Run | Pool) -> dict[str, Any]:
    """A part of the study, for a process of its own."""
    return simulate_run(what) if isinstance(what, Run) else smallest_pool(what.layer_overhead_s)


def loaded(parts: Mapping[str, Mapping[str, Any]], rate: float, name: str, key: str) -> float:
    """Of the runs under a load, the mean over seeds."""
    return statistics.fmean(parts[f"load-{rate:g}-{name}-{seed}"][key] for seed in range(LOAD_SEEDS))


def runs(seeds: int) -> dict[str, Run | Pool]:
    """Every simulated part, the longest first."""
    found: dict[str, Run | Pool] = {"pool-0": Pool(0.0), "pool-0.4ms": Pool(0.4e-3)}
    for overhead in (0.0, 0.4e-3):
        for name, share in (("base", 0.0), ("adaptive", None)):
            found[f"full-{overhead * 1e3:g}ms-{name}"] = Run(
                model="opt_13b", kv_bytes=58e9, share=share, requests=1500, layer_overhead_s=overhead
            )
    for seed in range(seeds):
        for name, share in (("base", 0.0), ("k8", 8 / 32), ("k16", 16 / 32), ("adaptive", None)):
            found[f"r-{name}-{seed}"] = Run(share=share, seed=seed, trace=name == "adaptive" and seed == 0)
    for k in range(1, 32):
        found[f"fixed-{k}"] = Run(share=k / 32, trace=k in (8, 16, 24, 30))
    for k in (4, 8, 12, 16, 20, 24, 28):
        for placement in ("static_layers", "ring"):
            found[f"{placement}-{k}"] = Run(share=k / 32, placement=placement)  # type: ignore[arg-type]
    for name, share in (("base", 0.0), ("k8", 8 / 32), ("k16", 16 / 32)):
        found[f"reserve-{name}"] = Run(share=share, admission="reserve")
    for pool in (0.5e9, 1.0e9):
        for name, share in (("base", 0.0), ("k8", 8 / 32), ("k16", 16 / 32)):
            found[f"pool-{pool / 1e9:g}GB-{name}"] = Run(share=share, kv_bytes=pool)
    for rate in RATES:
        for name, share in (("base", 0.0), ("k16", 16 / 32), ("adaptive", None)):
            for seed in range(LOAD_SEEDS):
                found[f"load-{rate:g}-{name}-{seed}"] = Run(share=share, kv_bytes=1e9, per_second=rate, seed=seed)
    for link in LINKS:
        found[f"link-{link / 1e9:g}-adaptive"] = Run(share=None, link_bytes_per_s=link)
        found[f"link-{link / 1e9:g}-k16"] = Run(share=16 / 32, link_bytes_per_s=link)
    found["kv-base"], found["kv-adaptive"] = Run(kv_bytes=2e9), Run(kv_bytes=0.5e9, share=None)
    for limit in (32, 64, 128):
        found[f"flexgen-{limit}"] = Run(all_on_host=True, max_running=limit)
    for name, share in (("adaptive", None), ("k19", 19 / 32)):
        found[f"drop-{name}"] = Run(share=share, slow_link_bytes_per_s=100e9, requests=1200, trace=True)
    return found
