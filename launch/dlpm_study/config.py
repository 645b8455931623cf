"""Settings of the study, and the folder in which its finished parts wait for the rest."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically

POLICIES = ("fcfs", "lpm", "vtc", "dlpm")
"""In the order of the report."""


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """What is run.

    Args:
      quantum: of DLPM, in service (an extend token 1, an output token 2).
      quanta: for throughput against fairness.
      router_quantum: of D2LPM, for a client and replica.
      warm_s, span_s, spans: a visit of a policy to the live engine is a warm-up and so many spans that count.
      visits: of VTC and DLPM each, in ABBA order.
      short_spans: of a policy that is only there for comparison.
      simulated_s, simulated_warm_s: of virtual time.
      replicas, live_replicas: of the simulated and of the live fleet.
      hidden_size, layers, heads: of the live model, made of random weights.
      max_sequences, max_batch_tokens, page_size, num_pages: of each replica.
      seeds: of each simulated figure that is gated.
      workers: simulations side by side.
    """

    quantum: int = 2048
    quanta: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    router_quantum: int = 8000
    warm_s: float = 6.0
    span_s: float = 6.0
    spans: int = 4
    visits: int = 2
    short_spans: int = 2
    simulated_s: float = 60.0
    simulated_warm_s: float = 10.0
    replicas: int = 4
    live_replicas: int = 2
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    max_sequences: int = 16
    max_batch_tokens: int = 512
    page_size: int = 16
    num_pages: int = 384
    seeds: int = 2
    workers: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            for value in values if isinstance(values, tuple) else (values,):
                if not value > 0:
                    raise UserError(f"{field.name}: found {value}, expected a number > 0")

    @property
    def sizes(self) -> dict[str, int]:
        """A replica's settings."""
        names = ("max_sequences", "max_batch_tokens", "page_size", "num_pages")
        return {name: getattr(self, name) for name in names}

    def policy_options(self, name: str) -> dict[str, Any]:
        return {"quantum": self.quantum} if name == "dlpm" else {}


class Parts:
    """The finished parts of a study, a JSON file each: a study that is started again does the others.

    Args:
      settings: what the parts depend on, JSON-ready.

    Raises:
      UserError: the folder holds parts of a study with other settings.
    """

    def __init__(self, workdir: Path, settings: dict[str, Any]):
        self._folder = workdir / "parts"
        self._folder.mkdir(parents=True, exist_ok=True)
        file = workdir / "study.json"
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        if file.exists() and json.loads(file.read_text()) != json.loads(text):
            old = json.loads(file.read_text())
            changed = sorted(name for name in old.keys() | settings if old.get(name) != json.loads(text).get(name))
            raise UserError(
                f"{workdir}: found a study with other settings ({', '.join(changed)}), expected the same ones; choose "
                "another --workdir or delete it"
            )
        write_atomically(file, text)

    def get(self, name: str) -> dict[str, Any] | None:
        """A part, if it is finished."""
        file = self._folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def put(self, name: str, part: dict[str, Any]) -> dict[str, Any]:
        write_atomically(self._folder / f"{name}.json", json.dumps(part) + "\n")
        return part

    def make(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The part, computed unless it is finished."""
        found = self.get(name)
        return self.put(name, compute()) if found is None else found
