"""Who owns which page of the KV cache. Plain Python, no jax: the same objects run in the engine and in a simulator.

`pages.py` hands out page numbers and knows the owner of each; `radix.py` keeps the pages of prompts and answers that
are over, so that a later prompt with the same beginning finds them. After every operation a page is free, owned by the
tree, or private to exactly one sequence, and the three counts add up to the pool.
"""

from jaxstack.engine.memory.pages import PagePool
from jaxstack.engine.memory.radix import Match, Node, RadixTree

__all__ = ["Match", "Node", "PagePool", "RadixTree"]
