"""The study of MoE-Lightning: what the paper printed (`published.py`), the same by simulation (`simulated.py`) and by
the search (`policies.py`), on the emulated machine (`measured.py`), the report and the plots.
"""
