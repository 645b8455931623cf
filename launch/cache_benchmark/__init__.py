"""The benchmark of cache lookups: vectors and queries, and both sides (`sides.py`)."""
