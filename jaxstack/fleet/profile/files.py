"""Profiles in files: our own JSON, and those of AIBrix's GPU optimizer, which has a file for each type.

    {"version": 1,
     "grid": {"input_edges_tokens": [...], "output_edges_tokens": [...]},
     "objective": {"tpot_s": 0.12, "ttft_s": null, "quantile": 0.99},
     "types": {"A100": {"price_usd_per_hour": 3.67, "max_count": null, "instance_devices": 1,
                        "max_rate_rps": [[...]], "concurrency": [[...]]}},
     "source": "measured", "provenance": {...}}

Rows are inputs and columns outputs; 0 or null says that the type cannot serve the bucket. AIBrix's tables are the other
way round, and have the latency of a request in the place of the number under way: by Little's law one is the other
times the rate.
"""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.throughput import AcceleratorType, LatencyObjective, ThroughputProfile
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically

VERSION = 1

Loaded = tuple[ThroughputProfile, tuple[AcceleratorType, ...]]


def load_profile(*paths: str | Path) -> Loaded:
    """The profile in a file, or in several that have some of the types each, and the types with their prices.

    Raises:
      UserError: a file that cannot be read or is no profile, grids or objectives that differ, a type in two of them.
    """
    if not paths:
        raise UserError("profile: found no file, expected at least one")
    loaded = [_load(Path(path)) for path in paths]
    first, types = loaded[0]
    rates, concurrency = dict(first.max_rate_rps), dict(first.concurrency or {})
    for path, (profile, more) in zip(paths[1:], loaded[1:]):
        for name in ("grid", "objective"):
            if getattr(profile, name) != getattr(first, name):
                raise UserError(f"{path}: found another {name} than in {paths[0]}, expected the same one")
        for name in profile.names:
            if name in rates:
                raise UserError(f"{path}: found {name!r}, which is in a file before it, expected each type once")
        rates |= profile.max_rate_rps
        concurrency |= profile.concurrency or {}
        types += more
    known = all(profile.concurrency is not None for profile, _ in loaded)
    whole = dataclasses.replace(first, max_rate_rps=rates, concurrency=concurrency if known else None)
    return whole, types


def save_profile(path: str | Path, profile: ThroughputProfile, types: Sequence[AcceleratorType]) -> None:
    """Writes a profile in our own format."""
    objective = dataclasses.asdict(profile.objective)
    if math.isinf(objective["tpot_s"]):
        objective["tpot_s"] = None
    by_type: dict[str, Any] = {}
    for kind in types:
        by_type[kind.name] = {
            "price_usd_per_hour": kind.price_usd_per_hour,
            "max_count": kind.max_count,
            "instance_devices": kind.instance_devices,
            "max_rate_rps": profile.max_rate_rps[kind.name].tolist(),
        }
        if profile.concurrency is not None:
            by_type[kind.name]["concurrency"] = profile.concurrency[kind.name].tolist()
    written = {
        "version": VERSION,
        "grid": dataclasses.asdict(profile.grid),
        "objective": objective,
        "types": by_type,
        "source": profile.source,
        "provenance": dict(profile.provenance),
    }
    write_atomically(path, json.dumps(written, indent=1) + "\n")


def save_aibrix_profile(path: str | Path, profile: ThroughputProfile, kind: AcceleratorType) -> None:
    """Writes one type as AIBrix's GPU optimizer reads it."""
    rates = profile.max_rate_rps[kind.name].T
    written: dict[str, Any] = {
        "gpu": kind.name,
        "cost": kind.price_usd_per_hour,
        "tputs": rates.tolist(),
        "indexes": [list(profile.grid.output_edges_tokens), list(profile.grid.input_edges_tokens)],
        "created": time.time(),
        "slos": {"percentile": round(100 * profile.objective.quantile)},
    }
    if profile.concurrency is not None:
        under_way = profile.concurrency[kind.name].T
        written["e2e"] = np.where(rates > 0, under_way / np.maximum(rates, 1e-300), 0.0).tolist()
    for name, value in (("tpot", profile.objective.tpot_s), ("ttft", profile.objective.ttft_s)):
        if value is not None and math.isfinite(value):
            written["slos"][name] = value
    write_atomically(path, json.dumps(written) + "\n")


def read_json(path: Path, what: str) -> Mapping[str, Any]:
    """The object in a file. Raises UserError naming `what` was expected."""
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}), expected {what}") from None
    except ValueError as error:
        raise UserError(f"{path}: found no JSON ({error}), expected {what}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: found a {type(found).__name__}, expected {what}, an object")
    return found


def _load(path: Path) -> Loaded:
    found = read_json(path, "a profile")
    try:
        if "version" in found:
            return _ours(found)
        if "tputs" in found and "indexes" in found:
            return _aibrix(found)
        raise UserError("found neither 'version' nor 'tputs' and 'indexes', expected a profile of ours or of AIBrix")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"the field {error} is missing" if isinstance(error, KeyError) else f"{error}"
        raise UserError(f"{path}: {what}, expected a profile") from None


def _ours(found: Mapping[str, Any]) -> Loaded:
    if found["version"] != VERSION:
        raise UserError(f"version: found {found['version']!r}, expected {VERSION}")
    grid = LengthGrid(tuple(found["grid"]["input_edges_tokens"]), tuple(found["grid"]["output_edges_tokens"]))
    objective = dict(found["objective"])
    if objective.get("tpot_s") is None:
        objective["tpot_s"] = math.inf
    tables = found["types"]
    types = tuple(
        AcceleratorType(name, float(t["price_usd_per_hour"]), t.get("max_count"), t.get("instance_devices", 1))
        for name, t in tables.items()
    )
    known = all("concurrency" in t for t in tables.values())
    profile = ThroughputProfile(
        grid,
        {name: t["max_rate_rps"] for name, t in tables.items()},
        LatencyObjective(**objective),
        {name: t["concurrency"] for name, t in tables.items()} if known else None,
        found.get("source", "measured"),
        found.get("provenance", {}),
    )
    return profile, types


def _aibrix(found: Mapping[str, Any]) -> Loaded:
    outputs, inputs = (tuple(int(edge) for edge in edges) for edges in found["indexes"])
    grid = LengthGrid(inputs, outputs)
    name = str(found["gpu"])
    rates = np.array(found["tputs"], dtype=float).T
    slos = found.get("slos", {})
    quantile = slos.get("percentile", 0) / 100
    # Percentile 0 stands for the mean, which half of the requests keep, more or less.
    objective = LatencyObjective(slos.get("tpot", math.inf), slos.get("ttft"), quantile if quantile > 0 else 0.5)
    concurrency = None
    if "e2e" in found:
        latency = np.array(found["e2e"], dtype=float).T
        if latency.shape != rates.shape:
            raise UserError(f"e2e: found a table of {latency.shape}, expected {rates.shape} as tputs")
        concurrency = {name: np.where(rates > 0, np.maximum(1.0, rates * latency), 0.0)}
    profile = ThroughputProfile(grid, {name: rates}, objective, concurrency, "measured", {"format": "AIBrix"})
    return profile, (AcceleratorType(name, float(found.get("cost", 1.0))),)
