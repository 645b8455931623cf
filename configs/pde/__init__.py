"""Solves of the paper's equations: at a size for two cores, and (in `paper.py`) with the published settings."""
