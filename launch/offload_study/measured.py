"""The schedules raced on the emulated machine: a tiny Mixtral, real tokens, copies and threads; the times of a T4."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from jaxstack.engine.emulated_decode import emulate, resident_tokens
from jaxstack.engine.memory import hrm, laws
from jaxstack.engine.memory.schedule_build import TaskTimes
from jaxstack.engine.memory.schedule_sim import simulate
from launch.offload_study import published
from launch.offload_study.report import SIMULATED_VS_MEASURED_LIMIT
from launch.serve_benchmark.machine import FOREIGN_LIMIT, LoadMeter

SCHEDULES = ("S1", "S2", "S3", "S4")
MICRO_BATCHES = 6
# Waking a thread takes 0.1 to 0.3 ms, more where others use the machine, and a layer has some thirty tasks: much
# shorter periods would measure that.
PERIOD_S = 0.3
RUNS = 3


def scaled_times(*, on_device: bool) -> TaskTimes:
    """Of S1's published policy for 128 tokens: six of its micro-batches with their share of the weights, slowed down so
    that a layer of CGOPipe takes `PERIOD_S`.
    """
    setting = next(each for each in published.mtbench_settings() if each.name == "S1, 128")
    part = MICRO_BATCHES / setting.policy.n_micro_batches

    def times(attention_on_device: bool) -> TaskTimes:
        policy = dataclasses.replace(setting.policy, attention_on_device=attention_on_device)
        found = hrm.policy_times(setting.machine, setting.model, setting.workload, policy)
        return dataclasses.replace(found, weights=found.weights * part)

    factor = PERIOD_S / float(laws.s1_period(times(False), MICRO_BATCHES))
    return TaskTimes(*(factor * seconds for seconds in dataclasses.astuple(times(on_device))))


def race(say: Callable[[str], None]) -> dict[str, Any]:
    """Every schedule, beside the simulation of the same tasks: one run, or where the machine was busy and a period came
    out too long, the median of three in turns.

    Raises:
      RuntimeError: a schedule drew other tokens than the model with everything on the device.
    """
    expected = resident_tokens(micro_batches=MICRO_BATCHES)
    simulated: dict[str, float] = {}
    periods: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    late: dict[str, float] = dict.fromkeys(SCHEDULES, 0.0)
    foreign = 0.0
    for number in range(RUNS):
        for name in SCHEDULES:
            times = scaled_times(on_device=name == "S4")
            with LoadMeter() as meter:
                ran = emulate(name, times, micro_batches=MICRO_BATCHES, drain=name == "S1")
            if (ran.tokens != expected).any():
                raise RuntimeError(f"{name}: drew other tokens than the model with everything on the device")
            foreign = max(foreign, meter.foreign_cores)
            simulated[name] = simulate(ran.timeline.schedule).period
            periods[name].append(ran.timeline.period)
            late[name] = max(late[name], sum(usage.late_s for usage in ran.usage.values()) / ran.timeline.seconds)
            say(
                f"run {number + 1}: {name} takes {1e3 * ran.timeline.period:.1f} ms a layer, simulated "
                f"{1e3 * simulated[name]:.1f} ms"
            )
        measured = {name: statistics.median(found) for name, found in periods.items()}
        worst = max(abs(measured[name] / simulated[name] - 1) for name in SCHEDULES)
        if number == 0 and worst <= SIMULATED_VS_MEASURED_LIMIT:
            break
    rows = {
        name: {
            "measured_s": round(measured[name], 5),
            "runs_s": [round(each, 5) for each in periods[name]],
            "simulated_s": round(simulated[name], 5),
            "late_share": round(late[name], 4),
        }
        for name in SCHEDULES
    }
    return {
        **{f"s1_over_{name.lower()}": round(measured[name] / measured["S1"], 4) for name in SCHEDULES[1:]},
        "simulated_vs_measured": round(worst, 4),
        "tokens_equal": True,
        "schedules": rows,
        "foreign_cores": round(foreign, 2),
        "conclusive": foreign <= FOREIGN_LIMIT,
    }
