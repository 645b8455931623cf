"""What a machine can do: FLOP/s, bytes/s and bytes of its device and its host, and bytes/s of the link between them.

Plain Python. A profile is a name of `PROFILES`, or a JSON file that `python -m launch.probe_hardware` wrote.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Processor:
    """A device or a host.

    Args:
      flops_per_s: of dense matrix products in the dtype that is served.
      bytes_per_s: between its memory and its cores.
      memory_bytes: that programs may use.
    """

    flops_per_s: float
    bytes_per_s: float
    memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Link:
    """Between a host and one device. The two directions work at once.

    Args:
      to_device_bytes_per_s, to_host_bytes_per_s: from and to page-locked memory, the other direction idle.
      both_bytes_per_s: the sum of the two directions when both are busy; None: neither slows the other.
    """

    to_device_bytes_per_s: float
    to_host_bytes_per_s: float
    both_bytes_per_s: float | None = None


@dataclasses.dataclass(frozen=True)
class HardwareProfile:
    """One host with `devices` devices alike, behind one link.

    Args:
      name: for messages.
      device: ONE of the devices; `all_devices` is what they are together.
      note: where the figures come from.

    Raises:
      UserError: a figure that is not a positive number; the message names it.
    """

    name: str
    device: Processor
    host: Processor
    link: Link
    devices: int = 1
    note: str = ""

    def __post_init__(self) -> None:
        for part in ("device", "host", "link"):
            for field in dataclasses.fields(getattr(self, part)):
                value = getattr(getattr(self, part), field.name)
                if value is None and field.name == "both_bytes_per_s":
                    continue
                _positive(f"machine {self.name!r}: {part}.{field.name}", value)
        _positive(f"machine {self.name!r}: devices", self.devices)

    @property
    def all_devices(self) -> Processor:
        """The devices as one, as tensor parallelism uses them. The link does not get faster by it."""
        one = self.device
        return Processor(
            one.flops_per_s * self.devices, one.bytes_per_s * self.devices, one.memory_bytes * self.devices
        )

    def with_devices(self, devices: int) -> "HardwareProfile":
        """The same machine with so many devices."""
        return dataclasses.replace(self, devices=devices)

    def with_memory(self, *, device_bytes: int | None = None, host_bytes: int | None = None) -> "HardwareProfile":
        """The same machine with other sizes of memory (of one device, of the host)."""
        device = dataclasses.replace(self.device, memory_bytes=device_bytes or self.device.memory_bytes)
        host = dataclasses.replace(self.host, memory_bytes=host_bytes or self.host.memory_bytes)
        return dataclasses.replace(self, device=device, host=host)

    def scaled(self, factor: float, *, name: str | None = None) -> "HardwareProfile":
        """A machine `factor` times as large and as fast in everything: what a model `factor` times as large takes there
        is what the model takes here.
        """

        def processor(of: Processor) -> Processor:
            memory = max(1, round(of.memory_bytes * factor))
            return Processor(of.flops_per_s * factor, of.bytes_per_s * factor, memory)

        both = self.link.both_bytes_per_s
        link = Link(
            self.link.to_device_bytes_per_s * factor,
            self.link.to_host_bytes_per_s * factor,
            None if both is None else both * factor,
        )
        return dataclasses.replace(
            self, name=name or self.name, device=processor(self.device), host=processor(self.host), link=link
        )

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, found: Any, *, source: str = "machine") -> "HardwareProfile":
        """The profile in an object that `as_json` made.

        Raises:
          UserError: a field is missing, unknown, or not a positive number; the message names it and `source`.
        """
        fields = _fields(found, cls, source, "a machine")
        for part, kind in (("device", Processor), ("host", Processor), ("link", Link)):
            fields[part] = kind(**_fields(fields[part], kind, f"{source}: {part}", part))
        try:
            return cls(**fields)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        write_atomically(path, json.dumps(self.as_json(), indent=2) + "\n")


def load_profile(name: str) -> HardwareProfile:
    """The profile of a name in `PROFILES`, or of a JSON file.

    Raises:
      UserError: neither; or the file is not a profile.
    """
    if name in PROFILES:
        return PROFILES[name]
    path = Path(name)
    if not path.is_file():
        raise UserError(f"machine: found {name!r}, expected a file or one of {', '.join(sorted(PROFILES))}")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{name}: found no JSON ({error}), expected a machine's profile") from None
    return HardwareProfile.from_json(found, source=name)


def _positive(what: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UserError(f"{what}: found {value!r}, expected a number > 0")


def _fields(found: Any, kind: type, source: str, what: str) -> dict[str, Any]:
    if not isinstance(found, Mapping):
        raise UserError(f"{source}: found {type(found).__name__}, expected an object with the fields of {what}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in found:
        if name not in fields:
            raise UserError(f"{source}: found the field {name!r}, expected only {', '.join(fields)}")
    for name, field in fields.items():
        if name not in found and field.default is dataclasses.MISSING:
            raise UserError(f"{source}: the field {name!r} is missing, expected {', '.join(fields)}")
    return dict(found)


def _profiles() -> dict[str, HardwareProfile]:
    # The authors of MoE-Lightning count a GB as 2^30 bytes, in rates as well.
    t4 = HardwareProfile(
        "t4",
        Processor(65e12, 300 * GIB, 15 * GIB),
        Processor(0.8e12, 100 * GIB, 188 * GIB),
        Link(16 * GIB, 16 * GIB),
        note="MoE-Lightning (arXiv 2411.11217): T4 16 GB, 24-core Xeon; its host memory from the policies it published",
    )
    l4 = HardwareProfile(
        "l4",
        Processor(104e12, 285 * GIB, 24 * GIB),
        Processor(1.6e12, 76 * GIB, 197_880_360_960),
        Link(16 * GIB, 16 * GIB),
        note="MoE-Lightning (arXiv 2411.11217): L4 24 GB, 24-core Xeon",
    )
    machines = [
        t4,
        l4,
        HardwareProfile(
            "t4_416gb",
            t4.device,
            Processor(0.8e12, 100 * GIB, 416 * GIB),
            t4.link,
            note="as t4, with the 32-core host that MoE-Lightning's settings with several T4 have",
        ),
        HardwareProfile(
            "a100_80gb",
            Processor(312e12, 2039e9, 80 * 10**9),
            Processor(1.6e12, 100e9, 200 * 10**9),
            Link(100e9, 100e9),
            note="data sheet for the device; host and link are the base of MoE-Lightning's figure 10",
        ),
        HardwareProfile(
            "h100_pcie",
            Processor(756e12, 2.0e12, 80 * 10**9),
            Processor(3e12, 300e9, 512 * 10**9),
            Link(54e9, 54e9),
            note="data sheet for the device, PCIe 5 as others measured it; the host assumed",
        ),
        HardwareProfile(
            "gh200",
            Processor(5e14, 3.6e12, 96 * 10**9),
            Processor(3.5e12, 500e9, 480 * 10**9),
            Link(419e9, 419e9, 500e9),
            note="Grace Hopper: NVLink-C2C as measured by the authors of Pie; both directions share the host's memory",
        ),
        HardwareProfile(
            "tpu_v5e",
            Processor(197e12, 819e9, 16 * GIB),
            Processor(1e12, 200e9, 48 * 10**9),
            Link(16e9, 16e9),
            note="data sheet for the chip; host and link assumed",
        ),
    ]
    # A model with a thousandth of Mixtral's bytes in a layer takes there what Mixtral takes on the card.
    machines += [machine.scaled(1 / 1024, name=f"emulated_{machine.name}") for machine in (t4, l4, machines[5])]
    return {machine.name: machine for machine in machines}


PROFILES: Mapping[str, HardwareProfile] = _profiles()
"""Machines by name."""
