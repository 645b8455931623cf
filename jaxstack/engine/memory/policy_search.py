"""The best policy of offloading, by exhaustion: every micro-batch and number of them, and the shares in closed form.

For a fixed cut of the requests all costs are linear, or a maximum of linear ones, in the two shares that stay on the
device. What memory allows is an interval of one share, given that the other is as large as it can be; inside it the
best is at an end, or at the minimum of a convex function.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jaxstack.engine.memory import hrm, laws
from jaxstack.engine.memory.hrm import LinearBytes, Prediction, Terms
from jaxstack.engine.memory.offload_plan import Model, Policy, Workload
from jaxstack.engine.memory.schedule_build import ScheduleShape, build_s1
from jaxstack.engine.memory.schedule_sim import simulate
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.machine import HardwareProfile

Objective = Literal["end_to_end", "decode"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a search looks at.

    Args:
      max_micro_batch, max_micro_batches, max_requests: None: what memory allows.
      attention_on_device, ffn_on_device: the placements to try.
      buffer_shares: to try. With less than 1 policies are compared by a law that is a bound (see `laws.s1_period`), and
        the best by it is simulated.
      kv_shares: of KV on the device, to try; None: any.
      split_experts: without `ffn_on_device`, the device computes those experts that it has room for; False: none.
    """

    max_micro_batch: int | None = None
    max_micro_batches: int | None = None
    max_requests: int | None = None
    attention_on_device: Sequence[bool] = (False, True)
    ffn_on_device: Sequence[bool] = (True, False)
    buffer_shares: Sequence[float] = (1.0,)
    kv_shares: Sequence[float] | None = None
    split_experts: bool = True


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Args:
      status: "optimal"; "feasible": a policy with fewer spare pages may do better than the best one found, up to
        `bound`; or "infeasible": then all but `reason`, `evaluated` and `seconds` are None or empty.
      policy, prediction: the best.
      bound: of the objective, in tokens/s. Every policy was looked at, so that no other one attains more.
      binding_resource: what the best one waits for.
      alternatives: the best of each other placement, best first.
      reason: why there is no better one, or none at all, in a line.
      evaluated: cuts of the requests that were priced.
    """

    status: Literal["optimal", "feasible", "infeasible"]
    policy: Policy | None
    prediction: Prediction | None
    bound: float | None
    binding_resource: str | None
    alternatives: tuple[tuple[Policy, Prediction], ...]
    reason: str
    evaluated: int
    seconds: float


def search(
    machine: HardwareProfile,
    model: Model,
    workload: Workload,
    *,
    objective: Objective = "end_to_end",
    terms: Terms = "full",
    limits: Limits | None = None,
) -> SearchResult:
    """Finds the policy with the most tokens/s that fits.

    Raises:
      UserError: an unknown objective or unknown terms.
    """
    if objective not in ("end_to_end", "decode"):
        raise UserError(f"objective: found {objective!r}, expected 'end_to_end' or 'decode'")
    limits = limits or Limits()
    began = time.perf_counter()
    evaluated = 0
    found: list[tuple[float, Policy]] = []
    for attention in limits.attention_on_device:
        for ffn in limits.ffn_on_device:
            kv_shares = limits.kv_shares if attention and limits.kv_shares is not None else (None,)
            for share, kv in itertools.product(limits.buffer_shares if ffn else (1.0,), kv_shares):
                resident = ffn or limits.split_experts
                case = _Case(machine, model, workload, objective, terms, attention, ffn, share, kv, resident)
                best = None
                for mu, n in case.cuts(limits):
                    evaluated += len(mu)
                    candidate = case.best_of(mu, n)
                    if candidate is not None and (best is None or candidate[0] > best[0] * (1 + 1e-12)):
                        best = candidate
                if best is not None:
                    found.append(best)
    if not found:
        reason = _why_not(machine, model, workload, limits)
        return SearchResult("infeasible", None, None, None, None, (), reason, evaluated, time.perf_counter() - began)
    bound = max(rate for rate, _ in found)
    priced = [(policy, _priced(machine, model, workload, policy, terms)) for _, policy in found]
    priced.sort(key=lambda each: -_objective(each[1], objective))
    policy, prediction = priced[0]
    return SearchResult(
        "optimal" if _objective(prediction, objective) >= bound * (1 - 1e-9) else "feasible",
        policy,
        prediction,
        bound,
        prediction.binding,
        tuple(priced[1:]),
        _why(prediction, machine),
        evaluated,
        time.perf_counter() - began,
    )


def _objective(prediction: Prediction, objective: Objective) -> float:
    return prediction.decode_tokens_per_s if objective == "decode" else prediction.end_to_end_tokens_per_s


def _priced(machine: HardwareProfile, model: Model, workload: Workload, policy: Policy, terms: Terms) -> Prediction:
    """As `hrm.predict`; where pages may come late, with the period of a simulation in place of the law's bound."""
    prediction = hrm.predict(machine, model, workload, policy, terms)
    if policy.buffer_share == 1 or terms == "paper" or policy.attention_on_device or policy.weight_resident == 1:
        return prediction
    times = hrm.policy_times(machine, model, workload, policy)
    # Three layers have the period of more.
    shape = ScheduleShape(
        3, policy.n_micro_batches, 6, look_ahead=policy.look_ahead or 2, buffer_share=policy.buffer_share
    )
    period = simulate(build_s1(shape, times)).period
    return dataclasses.replace(
        prediction,
        period_s=period,
        decode_tokens_per_s=float(hrm.decode_rate(terms, model, workload, policy.requests, period)),
        end_to_end_tokens_per_s=float(
            hrm.end_to_end_rate(model, workload, policy.requests, period, prediction.prefill_s)
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Case:
    """One placement."""

    machine: HardwareProfile
    model: Model
    workload: Workload
    objective: Objective
    terms: Terms
    attention_on_device: bool
    ffn_on_device: bool
    buffer_share: float
    kv_share: float | None
    resident: bool

    def _needs(self, mu: Any, n: Any) -> tuple[LinearBytes, LinearBytes]:
        parts = hrm.memory_parts(
            self.machine,
            self.model,
            self.workload,
            micro_batch=mu,
            n_micro_batches=n,
            attention_on_device=self.attention_on_device,
            ffn_on_device=self.ffn_on_device,
            buffer_share=self.buffer_share,
        )
        device, host = hrm.total(parts[0]), hrm.total(parts[1])
        if self.kv_share is not None:
            kv = self.kv_share
            device, host = (LinearBytes(each.fixed + kv * each.kv, each.weights, 0.0) for each in (device, host))
        return device, host

    def cuts(self, limits: Limits, block: int = 200_000) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All (mu, n) that could fit, some at a time."""
        most = self._most_requests(limits)
        mu_most = min(most, limits.max_micro_batch or most)
        counts = [min(most // mu, limits.max_micro_batches or most) for mu in range(1, mu_most + 1)]
        first = 0
        while first < len(counts):
            last, size = first, 0
            while last < len(counts) and (last == first or size + counts[last] <= block):
                size += counts[last]
                last += 1
            sizes = np.array(counts[first:last])
            mu = np.repeat(np.arange(first + 1, last + 1), sizes)
            n = np.arange(size) - np.repeat(np.cumsum(sizes) - sizes, sizes) + 1
            yield mu.astype(float), n.astype(float)
            first = last

    def _most_requests(self, limits: Limits) -> int:
        """By what each request needs at least; bytes grow with the requests whatever the cut."""
        asked = [number for number in (limits.max_requests, self.workload.requests) if number is not None]
        most = min(asked) if asked else 2**31
        low = 0  # fits, or is none
        high = 1
        while high <= most and self._fits_somehow(high):
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits_somehow(middle) else (low, middle)
        return low

    def _fits_somehow(self, requests: int) -> bool:
        """So many requests in micro-batches of one, which need the least."""
        low, high, _ = self._interval(np.array([1.0]), np.array([float(requests)]))
        return bool(low[0] <= high[0])

    def _interval(
        self, mu: np.ndarray, n: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, tuple[LinearBytes, LinearBytes]]:
        """The weights' shares for which some share of KV fits; empty where the first is above the second."""
        device, host = self._needs(mu, n)
        room, host_room = hrm.device_limit(self.machine) - device.fixed, hrm.host_limit(self.machine) - host.fixed
        # slope * share <= room, for each condition: each memory with as much KV elsewhere as there can be, ...
        conditions = [
            (device.weights, room - np.minimum(device.kv, 0.0)),
            (host.weights, host_room - np.minimum(host.kv, 0.0)),
        ]
        if self.attention_on_device:
            # ... and both at once: kv >= (host.weights w - host_room) / b and kv <= (room - device.weights w) / a.
            # Where buffers for all of KV would take more than KV itself, all of it is resident, and this says nothing.
            a, b = np.maximum(device.kv, 0.0), -host.kv
            both = np.where(a > 0, room * b + host_room * a, np.inf)
            conditions.append((np.where(a > 0, device.weights * b + host.weights * a, 0.0), both))
        low, high = np.zeros_like(mu), np.ones_like(mu) if self.resident else np.zeros_like(mu)
        for slope, space in conditions:
            slope, space = np.broadcast_arrays(np.asarray(slope, float) + 0.0 * mu, space)
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = space / slope
            high = np.where(slope > 0, np.minimum(high, ratio), high)
            low = np.where(slope < 0, np.maximum(low, ratio), low)
            high = np.where((slope == 0) & (space < 0), -1.0, high)
        # The edge of the memory is inside: a share that is 0 but for rounding is.
        return low, np.where((high < low) & (high >= low - 1e-12), low, high), (device, host)

    def _kv_share(self, weights: np.ndarray, needs: tuple[LinearBytes, LinearBytes]) -> np.ndarray:
        """The most KV that fits on the device beside so many weights."""
        if not self.attention_on_device or self.kv_share is not None:
            return np.full_like(weights, self.kv_share or 0.0)
        device = needs[0]
        room = hrm.device_limit(self.machine) - device.fixed - device.weights * weights
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(device.kv > 0, np.clip(room / device.kv, 0.0, 1.0), 1.0)

    def best_of(self, mu: np.ndarray, n: np.ndarray) -> tuple[float, Policy] | None:
        """The best of these cuts, and what it attains; None: none fits."""
        low, high, needs = self._interval(mu, n)
        fits = low <= high
        if not fits.any():
            return None
        mu, n, low, high, needs = _only(fits, mu, n, low, high, needs)
        weights = high
        if self.attention_on_device or not self.ffn_on_device:
            if self.ffn_on_device:
                # Were there room for all of KV beside the most weights: most cuts are worse even so.
                attained = np.maximum(self._rates(mu, n, high, needs), self._rates(mu, n, low, needs)).max()
                hopeful = self._rates(mu, n, high, needs, kv=np.ones_like(high)) >= attained
                mu, n, low, high, needs = _only(hopeful, mu, n, low, high, needs)
            weights = self._convex_minimum(mu, n, low, high, needs)
        rates = self._rates(mu, n, weights, needs)
        place = int(np.argmax(rates))
        policy = Policy(
            int(mu[place]),
            int(n[place]),
            self.attention_on_device,
            self.ffn_on_device,
            float(weights[place]),
            float(self._kv_share(weights, needs)[place]),
            buffer_share=self.buffer_share,
        )
        if self.ffn_on_device and not self.attention_on_device:
            times = hrm.policy_times(self.machine, self.model, self.workload, policy)
            ahead = laws.s1_look_ahead(times, policy.n_micro_batches)
            if self.buffer_share < 1:
                # Where no page goes, the link is through with a micro-batch before the next one's attention: two more
                # in hand bridge that (measured: with one ahead the link idles, with three more nothing is gained).
                ahead = min(policy.n_micro_batches, ahead + 2)
            policy = dataclasses.replace(policy, look_ahead=ahead)
        return float(rates[place]), policy

    def _rates(
        self,
        mu: Any,
        n: Any,
        weights: Any,
        needs: tuple[LinearBytes, LinearBytes],
        *,
        kv: np.ndarray | None = None,
    ) -> np.ndarray:
        """Tokens/s of each cut; with as much KV on the device as fits, unless told."""
        shares = {"weight_resident": weights, "kv_resident": self._kv_share(weights, needs) if kv is None else kv}
        seconds = hrm.layer_terms(
            self.machine,
            self.model,
            self.workload,
            self.terms,
            micro_batch=mu,
            n_micro_batches=n,
            attention_on_device=self.attention_on_device,
            ffn_on_device=self.ffn_on_device,
            buffer_share=self.buffer_share,
            **shares,
        )
        period = np.maximum.reduce(np.broadcast_arrays(*seconds.values()))
        if self.objective == "decode":
            return hrm.decode_rate(self.terms, self.model, self.workload, mu * n, period)
        prefill = hrm.prefill_seconds(
            self.machine, self.model, self.workload, micro_batch=mu, n_micro_batches=n, **shares
        )
        return hrm.end_to_end_rate(self.model, self.workload, mu * n, period, prefill)

    def _convex_minimum(
        self, mu: Any, n: Any, low: np.ndarray, high: np.ndarray, needs: tuple[LinearBytes, LinearBytes]
    ) -> np.ndarray:
        """The weights' shares with the highest rates; time is convex in them, so thirds close in on its minimum."""
        left, right = low, high
        for _ in range(45):
            third = (right - left) / 3
            nearer = self._rates(mu, n, left + third, needs) >= self._rates(mu, n, right - third, needs)
            left, right = np.where(nearer, left, left + third), np.where(nearer, right - third, right)
        middle = (left + right) / 2
        best, rate = high, self._rates(mu, n, high, needs)
        for candidate in (middle, low):
            other = self._rates(mu, n, candidate, needs)
            better = other > rate * (1 + 1e-12)
            best, rate = np.where(better, candidate, best), np.where(better, other, rate)
        return best


def _only(
    chosen: np.ndarray, mu: np.ndarray, n: np.ndarray, low: np.ndarray, high: np.ndarray, needs: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, tuple[LinearBytes, LinearBytes]]:
    """The chosen ones of all cuts."""

    def cut(each: LinearBytes) -> LinearBytes:
        parts = (each.fixed, each.weights, each.kv)
        return LinearBytes(*(np.broadcast_to(part, chosen.shape)[chosen] for part in parts))

    return mu[chosen], n[chosen], low[chosen], high[chosen], (cut(needs[0]), cut(needs[1]))


_WORDS = {
    "to_device": "the link to the device",
    "to_host": "the link to the host",
    "device": "the device",
    "host": "the host",
    "chain": "one micro-batch from end to end",
    "late": "pages that find no free slot",
}


def _why(prediction: Prediction, machine: HardwareProfile) -> str:
    """What the best policy waits for, and how full the memories are."""
    others = sorted((s for name, s in prediction.seconds.items() if name != prediction.binding), reverse=True)
    second = f"{others[0] / prediction.period_s:.0%}" if others else "0%"
    device = prediction.device_bytes / hrm.device_limit(machine)
    host = prediction.host_bytes / hrm.host_limit(machine)
    return (
        f"{_WORDS[prediction.binding]} binds, the next resource is {second} busy; device memory {device:.0%} and host "
        f"memory {host:.0%} of what a plan may fill"
    )


def _why_not(machine: HardwareProfile, model: Model, workload: Workload, limits: Limits) -> str:
    """For the placement that is nearest to fitting: which memory one request overfills, by how much, with what."""
    reasons: list[tuple[float, str]] = []
    for attention in limits.attention_on_device:
        for ffn in limits.ffn_on_device:
            device, host = hrm.memory_parts(
                machine,
                model,
                workload,
                micro_batch=1.0,
                n_micro_batches=1.0,
                attention_on_device=attention,
                ffn_on_device=ffn,
                buffer_share=min(limits.buffer_shares),
            )
            # The ends of the shares and where the device is just full; whatever is least in excess there.
            corners = [(w, kv) for w in np.linspace(0, 1, 65) for kv in ((0.0, 1.0) if attention else (0.0,))]
            reasons.append(min(_excess(machine, device, host, *corner) for corner in corners))
    return min(reasons)[1]


def _excess(machine: HardwareProfile, device: Any, host: Any, weights: float, kv: float) -> tuple[float, str]:
    found = []
    for name, parts, room in (
        ("device", device, hrm.device_limit(machine)),
        ("host", host, hrm.host_limit(machine)),
    ):
        sizes = {what: float(part.at(weights, kv)) for what, part in parts.items()}
        needed, largest = sum(sizes.values()), max(sizes, key=lambda what: sizes[what])
        gib = 2**30
        found.append(
            (
                needed - room,
                f"{name} memory: one request needs {needed / gib:.3g} GiB (most of it {largest}, "
                f"{sizes[largest] / gib:.3g} GiB), a plan may fill {room / gib:.3g} GiB: "
                f"{(needed - room) / gib:.3g} GiB too little",
            )
        )
    return max(found)
