"""Who goes next. Plain Python, no jax: a policy runs in the engine and in a simulator with a virtual clock alike.

`policy.py` says what a policy is asked and told; `fcfs.py` is first come, first served.
"""

from jaxstack.engine.scheduling.fcfs import FirstComeFirstServed
from jaxstack.engine.scheduling.policy import Policy, Schedulable, SchedulerView

__all__ = ["FirstComeFirstServed", "Policy", "Schedulable", "SchedulerView"]
