"""The study of Melange (Griggs et al. 2024): workloads and problems (`workloads.py`), what mixes cost beside single
types (`costs.py`), plans replayed (`replays.py`), the solver's race (`race.py`), and what is printed and drawn.
"""
