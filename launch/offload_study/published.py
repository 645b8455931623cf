"""What the paper and its artifact printed (Cao et al., arXiv 2411.11217, and the artifact's plot data).

These figures stand beside ours; of them only policies enter what we compute.
"""

import dataclasses
from collections.abc import Mapping

from jaxstack.engine.memory import hrm
from jaxstack.engine.memory.hrm import MODELS, Model
from jaxstack.engine.memory.offload_plan import Policy, Workload
from jaxstack.runtime.machine import PROFILES, HardwareProfile

GENERATED = (32, 64, 128, 256)
MTBENCH_TOKENS, MTBENCH_LONGEST = 77, 418

SETTINGS: Mapping[str, tuple[str, int, str]] = {
    "S1": ("t4", 1, "mixtral_8x7b"),
    "S2": ("l4", 1, "mixtral_8x7b"),
    "S6": ("t4_416gb", 2, "mixtral_8x22b"),
    "S7": ("t4_416gb", 4, "mixtral_8x22b"),
    "S8": ("t4_416gb", 2, "dbrx"),
    "S9": ("t4_416gb", 4, "dbrx"),
}
"""Setting -> machine, devices, model (table 2)."""

MTBENCH: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "FlexGen": {
        "S1": (12.1, 12.3, 9.5, 9.6),
        "S2": (29.2, 34.9, 37.2, 28.8),
        "S6": (4.25, 4.4, 4.77, 3.66),
        "S7": (4.97, 5.31, 4.36, 2.96),
    },
    "FlexGen(c)": {
        "S1": (9.8, 9.4, 7.2, 6.8),
        "S2": (17.5, 18.9, 20.0, 15.9),
        "S6": (2.7, 2.86, 3.44, 3.09),
        "S7": (1.78, 0.97, 1.02, 0.67),
    },
    "DeepSpeed": {
        "S1": (7.1, 7.6, 7.8, 6.7),
        "S2": (12.7, 13.3, 12.1, 11.8),
        "S6": (0.56, 0.59, 0.61, 0.62),
        "S7": (0.9, 1.0, 1.2, 1.3),
    },
    "MoE-Lightning (p)": {
        "S1": (15.6, 24.0, 30.1, 33.9),
        "S2": (53.7, 67.4, 79.0, 78.6),
        "S6": (5.38, 7.33, 7.75, 9.13),
        "S7": (14.9, 22.4, 26.2, 25.8),
    },
    "MoE-Lightning": {
        "S1": (63.0, 101.3, 97.7, 96.7),
        "S2": (203.0, 294.5, 217.5, 167.9),
        "S8": (34.0, 36.2, 29.7, 25.9),
        "S9": (71.5, 83.6, 83.0, 59.5),
    },
}
"""System -> setting -> tokens/s for 32, 64, 128 and 256 generated tokens (figure 7, figure 8)."""

HELM: Mapping[str, Mapping[str, tuple[float, int, int]]] = {
    "FlexGen(c)": {
        "reasoning S1": (16.9, 32, 61),
        "reasoning S2": (20.0, 64, 33),
        "summarisation S1": (2.6, 3, 92),
        "summarisation S2": (4.3, 8, 36),
    },
    "FlexGen": {
        "reasoning S1": (22.7, 32, 61),
        "reasoning S2": (50.1, 64, 33),
        "summarisation S1": (3.9, 3, 92),
        "summarisation S2": (7.1, 8, 36),
    },
    "DeepSpeed": {
        "reasoning S1": (11.8, 102, 1),
        "reasoning S2": (18.6, 156, 1),
        "summarisation S1": (0.97, 8, 1),
        "summarisation S2": (1.4, 12, 1),
    },
    "MoE-Lightning (p)": {
        "reasoning S1": (26.3, 36, 26),
        "reasoning S2": (105.3, 100, 15),
        "summarisation S1": (4.5, 4, 19),
        "summarisation S2": (12.4, 8, 36),
    },
}
"""System -> workload and setting -> tokens/s, micro-batch, number of micro-batches (table 4)."""

HELM_WORKLOADS: Mapping[str, Workload] = {
    "reasoning": Workload(256, 50),
    "summarisation": Workload(1984, 64),
}
"""Padded to the longest prompt, as all of table 4."""

ABLATION: Mapping[str, tuple[int, int, float]] = {
    "FlexGen, its own policy": (8, 139, 9.5),
    "FlexGen, our policy": (36, 14, 16.8),
    "FlexGen, our micro-batch": (36, 31, 20.7),
    "MoE-Lightning (p)": (36, 14, 30.1),
}
"""Row -> micro-batch, number of micro-batches, tokens/s (table 5: S1, padded, 128 generated)."""

ATTENTION_MS: Mapping[str, float] = {"CPU attention": 6.3, "KV over the link": 21.8, "MoE FFN": 12.5}
"""Figure 9: micro-batch 128, context 512, on S2."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One of the settings in which schedules are compared."""

    name: str
    machine: HardwareProfile
    model: Model
    workload: Workload
    policy: Policy

    @property
    def executed(self) -> "Setting":
        """As the release runs it: whole experts are resident or not."""
        experts = self.model.experts
        share = int(experts * self.policy.weight_resident) / experts
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, weight_resident=share))


def most_resident(machine: HardwareProfile, model: Model, workload: Workload, mu: int, n: int) -> float:
    """The share of the experts that fits on the device beside what such a policy needs: the authors' optimum."""
    parts, _ = hrm.memory_parts(
        machine, model, workload, micro_batch=mu, n_micro_batches=n, attention_on_device=False, ffn_on_device=True
    )
    found = hrm.total(parts)
    return min(1.0, float((hrm.device_limit(machine) - found.fixed) / found.weights))


def mtbench_settings() -> list[Setting]:
    """The eight published policies of MTBench without padding."""
    published = {
        "S2": ((324, 14), (228, 16), (164, 16), (132, 12)),
        "S1": ((164, 19), (164, 19), (164, 14), (100, 15)),
    }
    found = []
    for name, cuts in published.items():
        machine, _, model = SETTINGS[name]
        for generated, (mu, n) in zip(GENERATED, cuts):
            workload = Workload(MTBENCH_TOKENS, generated)
            share = most_resident(PROFILES[machine], MODELS[model], workload, mu, n)
            policy = Policy(mu, n, weight_resident=share)
            found.append(Setting(f"{name}, {generated}", PROFILES[machine], MODELS[model], workload, policy))
    return found


def padded_settings() -> list[Setting]:
    """The five that are padded. The paper prints no share for them; these are ours."""
    mixtral = MODELS["mixtral_8x7b"]
    found = [
        Setting(
            "S1 padded, 128",
            PROFILES["t4"],
            mixtral,
            Workload(MTBENCH_LONGEST, 128),
            Policy(36, 14, weight_resident=0.06),
        )
    ]
    shares = {"reasoning S1": 0.05, "reasoning S2": 0.08, "summarisation S1": 0.05, "summarisation S2": 0.08}
    for name, share in shares.items():
        _, mu, n = HELM["MoE-Lightning (p)"][name]
        kind, setting = name.split()
        machine = PROFILES[SETTINGS[setting][0]]
        found.append(Setting(name, machine, mixtral, HELM_WORKLOADS[kind], Policy(mu, n, weight_resident=share)))
    return found
