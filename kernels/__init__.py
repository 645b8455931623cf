"""Arrays in, arrays out: one folder per operation, knowing nothing of models.

Each folder holds `ref.py` (plain `jax.numpy`, the oracle), the faster forms that exist for it, and one public function
whose `implementation=` argument chooses among them; `None` picks by platform and always works.
"""

# `jaxstack` reads this on import: another distribution on the index is also called "kernels".
BELONGS_TO = "jaxstack"
