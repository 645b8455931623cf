"""Replicas on clouds, by SkyPilot: each is a cluster with the service's name and its number, so that launching it twice
launches it once. The package comes with an extra and is imported when this is made.

Calls of SkyPilot return the id of a request, are waited for with `sky.get`, and block: they run on threads.
"""

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxstack.fleet.controller.provisioner import Handle, LaunchFailed, Observation, ReplicaSpec
from jaxstack.fleet.controller.service_spec import ServiceSpec
from jaxstack.fleet.spot.view import FailureReason, Kind, ZonePrice
from jaxstack.runtime.errors import UserError

_NOT_OURS = ("service", "jaxstack")
_CAPACITY = ("resourcesunavailable", "capacity", "no resource", "stockout", "unfulfillable", "insufficient")
_QUOTA = ("quota", "limitexceeded", "vcpulimit")
_CREDENTIALS = ("credential", "permission", "unauthorized", "authentication", "no cloud access", "nocloudaccess")


class SkyPilotProvisioner:
    """A zone is `cloud/region/zone`, or `cloud/region`; those of the service file's `resources.any_of`, or `ordered`.

    Args:
      spec: of the service; its `jaxstack.zones` give prices, by the same names, where the catalogue's are not wanted.

    Raises:
      UserError: the package is not installed, or the file names no place.
    """

    def __init__(self, spec: ServiceSpec):
        try:
            self._sky: Any = importlib.import_module("sky")
        except ImportError:
            raise UserError("provisioner: skypilot is not installed; pip install 'jaxstack[skypilot]'") from None
        resources = spec.content.get("resources") or {}
        options = resources.get("any_of") or resources.get("ordered") or [resources]
        shared = {key: value for key, value in resources.items() if key not in ("any_of", "ordered")}
        self._options = {_name({**shared, **option}): {**shared, **option} for option in options}
        if "" in self._options:
            raise UserError("resources: found an option without cloud or region, expected both in each of any_of")
        if spec.port is None:
            raise UserError("resources.ports: missing; expected the port that a replica listens on")
        self._spec, self._port = spec, spec.port
        self._places: dict[str, tuple[str, Kind]] = {}
        self._prices = {zone.name: ZonePrice(zone.spot, zone.on_demand, zone.region) for zone in spec.more.zones}

    def zones(self) -> Mapping[str, ZonePrice]:
        return {name: self._prices.get(name, ZonePrice(1.0, 3.0, name.rpartition("/")[0])) for name in self._options}

    def task(self, zone: str, kind: Kind, spec: ReplicaSpec) -> Any:
        """The `sky.Task` of a replica: the service's file, in one place, as spot or not."""
        content: dict[str, Any] = {key: value for key, value in spec.content.items() if key not in _NOT_OURS}
        content["resources"] = {**self._options[zone], "use_spot": kind == "spot", "ports": self._port}
        content["envs"] = {**(content.get("envs") or {}), "PORT": str(self._port)}
        return self._sky.Task.from_yaml_config(content)

    async def launch(self, replica_id: str, zone: str, kind: Kind, spec: ReplicaSpec) -> Handle:
        self._places[replica_id] = zone, kind
        try:
            task = self.task(zone, kind, spec)
            await asyncio.to_thread(self._launch, task, replica_id)
        except Exception as error:
            raise LaunchFailed(reason_of(error), " ".join(str(error).split())[:300]) from error
        for observed in await self.observe():
            if observed.replica_id == replica_id:
                return observed.handle
        raise LaunchFailed("capacity", "it was gone as soon as it was there")

    def _launch(self, task: Any, name: str) -> None:
        request = self._sky.launch(task, cluster_name=name, retry_until_up=False)
        self._sky.stream_and_get(request)

    async def observe(self) -> Sequence[Observation]:
        found = await asyncio.to_thread(self._status)
        return [observed for record in found if (observed := self._observed(record)) is not None]

    def _status(self) -> list[Any]:
        refresh = self._sky.StatusRefreshMode.AUTO
        return self._sky.get(self._sky.status(refresh=refresh))

    def _observed(self, record: Any) -> Observation | None:
        name = record["name"]
        if not name.startswith(f"{self._spec.name}-") or not name.rpartition("-")[2].isdigit():
            return None
        zone, kind = self._places.get(name, ("", "spot"))
        handle = record.get("handle")
        launched = getattr(handle, "launched_resources", None)
        if not zone and launched is not None:  # of a controller that is no more
            there = {"cloud": str(launched.cloud), "region": launched.region, "zone": launched.zone}
            zone = next(
                (known for known in (_name(there), _name({**there, "zone": None})) if known in self._options), ""
            )
            kind = "spot" if launched.use_spot else "on_demand"
        alive = record["status"] is not None and record["status"].value in ("INIT", "UP")
        address = getattr(handle, "head_ip", None) or "0.0.0.0"
        return Observation(name, zone, kind, alive, Handle(f"http://{address}:{self._port}"))

    async def terminate(self, replica_id: str) -> None:
        def down() -> None:
            try:
                self._sky.get(self._sky.down(replica_id))
            except Exception as error:
                if "does not exist" not in str(error):
                    raise

        await asyncio.to_thread(down)
        self._places.pop(replica_id, None)

    async def last_lines(self, replica_id: str, count: int) -> list[str]:
        return []


def reason_of(error: BaseException) -> FailureReason:
    """Why a launch failed, from what SkyPilot raises."""
    text = f"{type(error).__name__} {error}".lower()
    # Quota first: clouds speak of capacity in the same breath.
    for reason, words in (("quota", _QUOTA), ("credentials", _CREDENTIALS), ("capacity", _CAPACITY)):
        if any(word in text for word in words):
            return reason  # type: ignore[return-value]
    return "other"


def _name(option: Mapping[str, Any]) -> str:
    if not option.get("cloud") or not option.get("region"):
        return str(option["infra"]) if option.get("infra") else ""
    parts = [str(option["cloud"]).lower(), str(option["region"])]
    return "/".join([*parts, str(option["zone"])] if option.get("zone") else parts)
