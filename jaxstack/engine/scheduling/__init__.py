"""Who goes next. Plain Python, no jax: a policy runs in the engine and in a simulator with a virtual clock alike.

`policy.py` says what a policy is asked and told. `fcfs.py` is first come, first served; `lpm.py` goes by the longest
cached prefix; `vtc.py` by who has had least; `dlpm.py` is local and fair, with deficits kept in `ledger.py`. All count
in the currency of `cost.py`. `steward.py` stands between the scheduler and a policy: it keeps `accounts.py` of every
client and the `certificate.py` that sets the gap between clients beside its bound. `prefix_lengths.py` knows how much
of every waiting request is cached.

What a policy is worth is seen in `simulator.py`: the engine's scheduler under a virtual clock, with steps that cost
what `step_cost.py` has fitted to a live engine. `driving.py` brings load to it, or to a live engine: the closed loops
of `workloads.py`, the programs of `programs.py`, the open arrivals of `arrivals.py`, or what `trace.py` has recorded.
`measuring.py` says what came of it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jaxstack.engine.scheduling.accounts import ClientAccount, ClientAccounts
from jaxstack.engine.scheduling.certificate import FairnessCertificate, tokens_after_admission
from jaxstack.engine.scheduling.cost import ServiceCost
from jaxstack.engine.scheduling.dlpm import DeficitLongestPrefixMatch
from jaxstack.engine.scheduling.fcfs import FirstComeFirstServed
from jaxstack.engine.scheduling.ledger import DeficitLedger
from jaxstack.engine.scheduling.lpm import LongestPrefixMatch
from jaxstack.engine.scheduling.policy import Admission, ClientBlind, Policy, Schedulable, SchedulerView, TryAdmit
from jaxstack.engine.scheduling.prefix_lengths import PrefixLengths
from jaxstack.engine.scheduling.steward import FairnessReading, Room, Steward
from jaxstack.engine.scheduling.vtc import VirtualTokenCounter
from jaxstack.runtime.errors import UserError

__all__ = [
    "POLICIES",
    "Admission",
    "ClientAccount",
    "ClientAccounts",
    "ClientBlind",
    "DeficitLedger",
    "DeficitLongestPrefixMatch",
    "FairnessCertificate",
    "FairnessReading",
    "FirstComeFirstServed",
    "LongestPrefixMatch",
    "Policy",
    "PrefixLengths",
    "Room",
    "Schedulable",
    "SchedulerView",
    "ServiceCost",
    "Steward",
    "TryAdmit",
    "VirtualTokenCounter",
    "policy_named",
    "tokens_after_admission",
]

POLICIES: Mapping[str, Callable[..., Policy]] = {
    policy.name: policy
    for policy in (FirstComeFirstServed, LongestPrefixMatch, VirtualTokenCounter, DeficitLongestPrefixMatch)
}


def policy_named(name: str, **options: Any) -> Policy:
    """A new policy: "fcfs", "lpm", "vtc" or "dlpm".

    Args:
      options: of its constructor; `cost` and `weights` are every policy's, `quantum` and `max_overtakes` of "dlpm".

    Raises:
      UserError: an unknown name, an option that the policy does not have, or a value outside its range.
    """
    if name not in POLICIES:
        raise UserError(f"policy: found {name!r}, expected one of {', '.join(POLICIES)}")
    for option in ("quantum", "max_overtakes"):
        if option in options and name != DeficitLongestPrefixMatch.name:
            raise UserError(f"{option}: found {options[option]!r} for the policy {name!r}, expected none but for dlpm")
    return POLICIES[name](**options)
