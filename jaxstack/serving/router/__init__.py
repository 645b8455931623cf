"""The router: one OpenAI endpoint before several replicas, servers of ours or any others that speak OpenAI.

`policies.py` decides who gets a request (round robin, least load, cache-aware, Preble, D2LPM), in plain Python and
without jax, so that the same objects route in a simulator. They know of the replicas' caches through
`prefix_tree.py`, and of what each client has had through `deficits.py`; `mixed_fleet.py` has those that choose among
replicas of different kinds.

A request comes in at `service.py`, which reads who asks and what prefixes its prompt has; `dispatch.py` asks the
policy, sends it to a `replica.py`, and passes the answer on while `tally.py` reads along; when the replica is lost in
the middle, `migration.py` has what another needs to go on. `config.py` has the settings, `metrics.py` the figures, and
`running.py` runs it all.
"""

from jaxstack.serving.router.config import RouterConfig
from jaxstack.serving.router.deficits import ReplicaDeficits
from jaxstack.serving.router.policies import (
    ROUTING_POLICIES,
    CacheAware,
    D2Lpm,
    LeastLoad,
    Preble,
    ReplicaView,
    RoundRobin,
    RoutedRequest,
    RoutingPolicy,
    routing_policy_named,
)
from jaxstack.serving.router.prefix_tree import PrefixTree
from jaxstack.serving.router.running import BackgroundRouter, serve_router
from jaxstack.serving.router.service import build_router

__all__ = [
    "ROUTING_POLICIES",
    "BackgroundRouter",
    "CacheAware",
    "D2Lpm",
    "LeastLoad",
    "Preble",
    "PrefixTree",
    "ReplicaDeficits",
    "ReplicaView",
    "RoundRobin",
    "RoutedRequest",
    "RouterConfig",
    "RoutingPolicy",
    "build_router",
    "routing_policy_named",
    "serve_router",
]
