"""The parts of `launch/papers/dlpm.py`: settings, what runs live, what is simulated, and the report.

`simulated.py` and what it needs import no jax, so that its runs start at once in processes of their own.
"""
