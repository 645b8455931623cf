"""The router before the replicas: a process of its own, which outlives the controller, so that no stream ends with it.

And the two things that the controller asks over HTTP: the router for what it has to do, replicas whether they are
ready.
"""

import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from jaxstack.fleet.controller.controller import Traffic
from jaxstack.fleet.controller.local import LocalProvisioner
from jaxstack.fleet.controller.provisioner import LaunchFailed, Observation, ReplicaSpec
from jaxstack.fleet.controller.service_spec import ReadinessProbe, VirtualZone
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically

_ZONE = "proxy"
# One that ends as soon as it has started, because its port is taken for instance, is not started in a loop.
_RETRY_S = 5.0


class ProxyProcess:
    """Keeps one router running.

    Args:
      folder: where its files are; it is found there again.
      command: shell text that starts it on the port `$ROUTER_PORT`.
      port: where it listens; None takes the one it had, or a free one.
    """

    def __init__(self, folder: str | Path, command: str, port: int | None = None):
        self._place = LocalProvisioner(folder, [VirtualZone(_ZONE, capacity=0)])
        self._folder, self._command = Path(folder), command
        self._known = self._folder / "proxy.json"
        kept = self._kept()
        self._number, self._started_s = kept["number"], float("-inf")
        self.port = port or kept["port"] or self._place.free_port()
        if kept["port"] not in (None, self.port) and self._running() is not None:
            raise UserError(f"port: found {self.port}, expected {kept['port']}, where the proxy of this fleet listens")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        running = self._running()
        return None if running is None else running.handle.pid

    async def keep(self) -> bool:
        """Starts it unless it runs, or was started a moment ago; whether it runs. Raises LaunchFailed."""
        if self._running() is not None:
            return True
        if time.monotonic() - self._started_s < _RETRY_S:
            return False
        await self.stop()
        self._started_s = time.monotonic()
        with socket.socket() as probe:
            # Whoever has the port would be taken for the proxy, and be told of these replicas.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", self.port))
            except OSError as error:
                raise LaunchFailed("other", f"cannot listen on 127.0.0.1:{self.port} ({error.strerror})") from None
        self._number += 1
        write_atomically(self._known, json.dumps({"number": self._number, "port": self.port}))
        spec = ReplicaSpec(self._command, envs={"ROUTER_PORT": str(self.port)})
        await self._place.launch(f"proxy-{self._number}", _ZONE, "on_demand", spec)
        return True

    async def stop(self) -> None:
        await self._place.observe()
        if self._number:
            await self._place.terminate(f"proxy-{self._number}")

    async def last_lines(self, count: int) -> list[str]:
        return await self._place.last_lines(f"proxy-{self._number}", count)

    def _running(self) -> Observation | None:
        here = [o for o in self._place.observed() if o.alive and o.replica_id == f"proxy-{self._number}"]
        return here[0] if here else None

    def _kept(self) -> dict[str, Any]:
        try:
            return json.loads(self._known.read_text())
        except (FileNotFoundError, ValueError):
            return {"number": 0, "port": None}


class RouterClient:
    """A `Proxy` over HTTP.

    Args:
      client: with the router's URL as its base, and its key.
    """

    def __init__(self, client: httpx.AsyncClient):
        self._client = client
        self.status: dict[str, Any] = {}

    async def push(self, ready: list[str], lost: list[str]) -> dict[str, int] | None:
        answer = await self._ask("POST", "/router/replicas", {"replicas": ready, "lost": lost})
        return None if answer is None else {r["url"]: int(r["active"]) for r in answer["replicas"].values()}

    async def traffic(self) -> Traffic | None:
        answer = await self._ask("GET", "/router/status")
        if answer is None:
            return None
        self.status = answer
        return Traffic(int(answer["arrivals"]), int(answer["waiting"]))

    async def _ask(self, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        try:
            answer = await self._client.request(method, path, json=body)
            return answer.json() if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError):
            return None


class HttpProbe:
    """Asks replicas whether they are ready."""

    def __init__(self, client: httpx.AsyncClient):
        self._client = client

    async def __call__(self, url: str, probe: ReadinessProbe) -> bool:
        method = "GET" if probe.post_data is None else "POST"
        try:
            answer = await self._client.request(
                method,
                url + probe.path,
                json=probe.post_data,
                headers=dict(probe.headers),
                timeout=probe.timeout_s,
            )
        except httpx.HTTPError:
            return False
        return answer.status_code == 200


@contextlib.asynccontextmanager
async def http_clients(router_url: str, api_key: str | None = None) -> AsyncIterator[tuple[RouterClient, HttpProbe]]:
    """What a controller asks with."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    async with (
        httpx.AsyncClient(base_url=router_url, headers=headers, trust_env=False, timeout=5.0) as router,
        httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0)) as replicas,
    ):
        yield RouterClient(router), HttpProbe(replicas)
