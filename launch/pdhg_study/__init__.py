"""The study of the natural primal-dual method: who runs on what (entrants.py), how each was tuned (tuning.py, its
outcome in tuned.json), and what is made of the runs (report.py)."""
