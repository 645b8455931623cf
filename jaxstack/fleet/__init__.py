"""Many replicas of one model: what to rent, where to run it, and who keeps it running.

`profile/` says what one replica of an accelerator type sustains for requests of each size, from a data sheet, a file or
a live endpoint. `allocation/` turns a workload and such a profile into the cheapest mix of types (Melange), with a
bound, and decides when to change it. `simulator/` replays arrivals on a mix, step by step, against its objective.
`spot/` serves on instances that may be taken away: in which zones, how many, and how much on-demand beside them.
`joint.py` plans types, kinds and zones at once, and `joint_replay.py` tries such a plan on other days.

Imports run downward: the simulator knows plans, plans know profiles, and profiles know nothing of either. None of these
imports jax, and none is imported by the router, which is given plain arrays (`serving/router/mixed_fleet.py`).
"""
