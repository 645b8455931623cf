"""Keeps a service running: real replicas, real preemptions, one controller that may be killed itself.

`service_spec.py` reads the service file, `policy.py` makes the policy that it asks for (`fleet/spot/`, the same objects
that the simulator runs). `controller.py` looks, decides and acts; `state.py` is its memory, in which every side effect
stands before it is done and behind. `provisioner.py` is what it asks of whoever has the machines: `local.py` has
processes of this machine in virtual zones, which `preemptor.py` takes away, and `skypilot.py` has clouds. `proxy.py`
keeps the router before the replicas; when one is taken away in the middle of an answer, that goes on with another
(`serving/router/migration.py`). `page.py` shows all of it.
"""

from jaxstack.fleet.controller.controller import Controller, Service
from jaxstack.fleet.controller.local import LocalProvisioner
from jaxstack.fleet.controller.preemptor import Preemptor
from jaxstack.fleet.controller.provisioner import LaunchFailed, Observation, Provisioner, ReplicaSpec
from jaxstack.fleet.controller.service_spec import ServiceSpec, load_service, read_service
from jaxstack.fleet.controller.state import FleetState

__all__ = [
    "Controller",
    "FleetState",
    "LaunchFailed",
    "LocalProvisioner",
    "Observation",
    "Preemptor",
    "Provisioner",
    "ReplicaSpec",
    "Service",
    "ServiceSpec",
    "load_service",
    "read_service",
]
