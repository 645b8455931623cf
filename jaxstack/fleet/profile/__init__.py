"""What one replica of an accelerator type sustains, for requests of each size, within an objective of latency.

A `LengthGrid` cuts requests into buckets of input x output length; a `ThroughputProfile` has, for each type and bucket,
the highest rate that keeps the objective and how many requests are under way then. Profiles come from `roofline.py` (a
data sheet), from `files.py` (ours, the layout of Melange's authors, AIBrix's) or from `live.py` (a running endpoint).
"""

from jaxstack.fleet.profile.files import load_profile, save_profile
from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.roofline import DATASHEETS, Datasheet, ServedModel, throughput_from_datasheet
from jaxstack.fleet.profile.throughput import AcceleratorType, LatencyObjective, ThroughputProfile

__all__ = [
    "DATASHEETS",
    "AcceleratorType",
    "Datasheet",
    "LatencyObjective",
    "LengthGrid",
    "ServedModel",
    "ThroughputProfile",
    "load_profile",
    "save_profile",
    "throughput_from_datasheet",
]
