"""The serving policy that a service file asks for."""

from dataclasses import dataclass

from jaxstack.fleet.controller.service_spec import ServiceSpec
from jaxstack.fleet.spot.autoscaling import Autoscaler, FixedTarget, RequestRateAutoscaler
from jaxstack.fleet.spot.mixture import DynamicFallback, Mixture, OnDemandOnly, RiskWindow, SpotOnly, Wanted
from jaxstack.fleet.spot.placement import Backoff, ZonePlacer
from jaxstack.fleet.spot.policy import ServingPolicy
from jaxstack.fleet.spot.rebalancing import RebalanceConfig
from jaxstack.fleet.spot.view import Census


@dataclass(frozen=True)
class SpotAboveBase(SpotOnly):
    """So many on-demand replicas always, and the rest spot, whether these are ready or not."""

    base_on_demand: int = 0

    def wanted(self, target: int, census: Census, now_s: float) -> Wanted:
        if target == 0:
            return Wanted(0, 0)
        return Wanted(max(0, target + self.overprovision - self.base_on_demand), min(target, self.base_on_demand))


def policy_of(spec: ServiceSpec) -> ServingPolicy:
    """With our placement in any case: `spot_placer: dynamic_fallback` names it, and there is no other here."""
    asked, more = spec.policy, spec.more
    autoscaler: Autoscaler
    if asked.fixed or spec.target_qps is None or asked.max_replicas is None:
        autoscaler = FixedTarget(asked.min_replicas)
    else:
        autoscaler = RequestRateAutoscaler(
            asked.min_replicas,
            asked.max_replicas,
            spec.target_qps,
            upscale_delay_s=asked.upscale_delay_s,
            downscale_delay_s=asked.downscale_delay_s,
            scale_to_zero_delay_s=more.scale_to_zero_delay_s,
        )
    mixture: Mixture
    over = asked.overprovision if asked.overprovision is not None else int(asked.fallback)
    if not spec.spot:
        mixture = OnDemandOnly()
    elif asked.fallback:
        mixture = DynamicFallback(over, asked.base_on_demand)
    elif asked.base_on_demand:
        mixture = SpotAboveBase(over, asked.base_on_demand)
    else:
        mixture = SpotOnly(over)
    if spec.spot and more.risk_window_s is not None:
        mixture = RiskWindow(mixture, more.risk_window_s)
    backoff = Backoff(more.backoff_base_s, more.backoff_max_s)
    return ServingPolicy(
        autoscaler, mixture, ZonePlacer(backoff), on_demand_placer=ZonePlacer(backoff), rebalance=RebalanceConfig()
    )
