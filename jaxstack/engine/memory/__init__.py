"""Who owns which page of memory, and what moves when. Plain Python, no jax: the same objects run in the engine and in a
simulator.

`pages.py` hands out page numbers and knows the owner of each; `radix.py` keeps the pages of prompts and answers that
are over, so that a later prompt with the same beginning finds them. After every operation a page is free, owned by the
tree, or private to exactly one sequence, and the three counts add up to the pool.

Where a model is larger than its device (MoE-Lightning): `offload_plan.py` says what a plan is about, `hrm.py` what it
takes by the hierarchical roofline, `policy_search.py` finds the best one. `schedule.py` is a step's work as data, with
the proof that no data is touched too early or too late; `schedule_build.py` has the known orders, `schedule_sim.py`
times them and `laws.py` says in closed form what it finds. `batching.py` puts requests into micro-batches.
"""

from jaxstack.engine.memory.pages import PagePool
from jaxstack.engine.memory.radix import Match, Node, RadixTree

__all__ = ["Match", "Node", "PagePool", "RadixTree"]
