"""Routes OpenAI requests over several replicas, until Ctrl-C or SIGTERM.

    python -m launch.serve --port=8001 --trust_client_id &
    python -m launch.serve --port=8002 --trust_client_id &
    python -m launch.route --replicas=http://127.0.0.1:8001,http://127.0.0.1:8002 --port=8000

Clients then ask http://127.0.0.1:8000/v1 as they would ask one server. A replica is any server that speaks OpenAI;
those of launch.serve also report what their prefix caches lose, and when one of them is lost, the answers that it had
begun go on with another, token by token as they would have been. `/` says what the router knows, as JSON; `/metrics` is
for Prometheus, `/health` is 200 while a replica can be asked.

Policies: d2lpm (fair to clients, and local), cache_aware (SGLang's rule), preble, least_load, round_robin,
client_round_robin. Over replicas of different kinds, with the tables of a plan (launch.allocate): occupancy (the least
occupied one that can serve the request), plan, throughput, profiled_load, spill:

    python -m launch.route --policy=occupancy --routing_table=work/allocate/routing.json \\
        --replicas=http://127.0.0.1:8001,http://127.0.0.1:8002 --replica_kinds=L4,A100-80GB
"""

import contextlib
from typing import Any

from absl import flags

from jaxstack.serving import ServerConfig
from jaxstack.serving.http_server import listen
from jaxstack.serving.router import ROUTING_POLICIES, RouterConfig, RoutingPolicy, routing_policy_named, serve_router
from jaxstack.serving.router.config import address
from jaxstack.serving.router.mixed_fleet import RULES, MixedFleet, RoutingTable
from launch import job

_HTTP = ServerConfig()
_ROUTER = RouterConfig(("http://127.0.0.1:1",))

_REPLICAS = flags.DEFINE_list("replicas", [], "URLs of the replicas, http://HOST:PORT, comma between them")
_POLICY: Any = flags.DEFINE_enum("policy", "d2lpm", [*ROUTING_POLICIES, *RULES], "who gets a request")
_QUANTUM = flags.DEFINE_integer("quantum", 8000, "d2lpm: service a client may ask of each replica in a round")
_CHARGE: Any = flags.DEFINE_enum(
    "charge", "extend", ["extend", "input"], "d2lpm: what is charged of a prompt: what must be computed, or all of it"
)
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "cache_aware (default 0.3), preble (0.5): share of the prompt that must be cached to follow it"
)
_BALANCE_ABS = flags.DEFINE_integer("balance_abs", 64, "cache_aware: loads further apart than this are evened out")
_BALANCE_REL = flags.DEFINE_float("balance_rel", 1.5, "cache_aware: and by more than so many times")
_TABLE = flags.DEFINE_string("routing_table", None, "occupancy and the like: routing.json of launch.allocate")
_KINDS = flags.DEFINE_list("replica_kinds", [], "and of which kind each replica is, in the order of --replicas")
_HOST = flags.DEFINE_string("host", _HTTP.host, "address to listen on; 0.0.0.0 lets other machines in")
_PORT = flags.DEFINE_integer("port", _HTTP.port, "port to listen on; 0 takes a free one")
_API_KEY = flags.DEFINE_string("api_key", None, "key that clients must send as bearer token")
_REPLICA_KEY = flags.DEFINE_string("replica_api_key", None, "key sent to the replicas; default: the client's own")
_TRUST = flags.DEFINE_bool("trust_client_id", False, "take a request's client from its header X-Client-Id")
_ORIGINS = flags.DEFINE_list("allowed_origins", [], "origins of web pages that may call the router")
_BODY = flags.DEFINE_integer("max_body_bytes", _HTTP.max_body_bytes, "largest request body")
_STREAMS = flags.DEFINE_integer("max_streams", 4096, "requests answered at once; more get 429")
_CONNECTIONS = flags.DEFINE_integer("max_connections", 8192, "open sockets; more are turned away")
_DRAIN = flags.DEFINE_float("drain_timeout_s", _HTTP.drain_timeout_s, "time for running answers on shutdown, seconds")
_STALL = flags.DEFINE_float("stall_timeout_s", _HTTP.stall_timeout_s, "a client that takes nothing so long is cut off")
_HEALTH = flags.DEFINE_float("health_interval_s", _ROUTER.health_interval_s, "between two looks at a replica, seconds")
_RETRIES = flags.DEFINE_integer("retries", _ROUTER.retries, "how often a request is sent again if its replica is lost")
_MIGRATIONS = flags.DEFINE_integer(
    "migration_limit", _ROUTER.migration_limit, "how often an answer whose replica is lost goes on with another"
)
_RESUME = flags.DEFINE_float("resume_timeout_s", _ROUTER.resume_timeout_s, "how long it waits for one, seconds")
_SILENCE = flags.DEFINE_float(
    "silence_timeout_s", _ROUTER.silence_timeout_s, "a replica that says nothing so long in an answer is given up"
)
_HOLD = flags.DEFINE_float(
    "hold_timeout_s", _ROUTER.hold_timeout_s, "how long a request waits for any replica, seconds"
)
_MANAGED = flags.DEFINE_bool("managed", False, "replicas come and go by POST /router/replicas; there may be none yet")
_PEERS = flags.DEFINE_list("peers", [], "d2lpm: URLs of other routers before the same replicas, to share accounts with")


def mixed_fleet(config: RouterConfig) -> RoutingPolicy:
    """The policy for replicas of different kinds."""
    if _TABLE.value is None:
        raise job.BadUsage(
            f"--routing_table is missing: --policy={_POLICY.value} reads routing.json of launch.allocate"
        )
    if len(_KINDS.value) != len(config.replicas):
        found = f"{len(_KINDS.value)} kinds for {len(config.replicas)} replicas"
        raise job.BadUsage(f"--replica_kinds: found {found}, expected one for each")
    names = [address(url, "replicas").partition("://")[2] for url in config.replicas]
    return MixedFleet(RoutingTable.load(_TABLE.value), dict(zip(names, _KINDS.value)), _POLICY.value)


def run() -> dict[str, Any]:
    http = ServerConfig(
        host=_HOST.value,
        port=_PORT.value,
        api_key=_API_KEY.value,
        trust_client_id=_TRUST.value,
        allowed_origins=tuple(_ORIGINS.value),
        max_body_bytes=_BODY.value,
        max_streams=_STREAMS.value,
        max_connections=_CONNECTIONS.value,
        drain_timeout_s=_DRAIN.value,
        stall_timeout_s=_STALL.value,
    )
    config = RouterConfig(
        replicas=tuple(_REPLICAS.value),
        http=http,
        replica_api_key=_REPLICA_KEY.value,
        health_interval_s=_HEALTH.value,
        retries=_RETRIES.value,
        migration_limit=_MIGRATIONS.value,
        resume_timeout_s=_RESUME.value,
        hold_timeout_s=_HOLD.value,
        silence_timeout_s=_SILENCE.value,
        managed=_MANAGED.value,
        peers=tuple(_PEERS.value),
    )
    options: dict[str, Any] = {}
    if _POLICY.value == "d2lpm":
        options = {"quantum": _QUANTUM.value, "charge": _CHARGE.value}
    elif _POLICY.value == "cache_aware":
        options = {"balance_abs": _BALANCE_ABS.value, "balance_rel": _BALANCE_REL.value}
    if _THRESHOLD.value is not None:
        name = {"cache_aware": "cache_threshold", "preble": "threshold"}.get(_POLICY.value)
        if name is None:
            raise job.BadUsage(f"--threshold: {_POLICY.value} has none; it is for cache_aware and preble")
        options[name] = _THRESHOLD.value
    policy = mixed_fleet(config) if _POLICY.value in RULES else routing_policy_named(_POLICY.value, **options)

    def on_ready(url: str) -> None:
        print(f"routing over {len(config.replicas)} replicas at {url}/v1", flush=True)

    with contextlib.closing(listen(http)) as listener:
        counts = serve_router(config, policy, listener=listener, on_ready=on_ready)
    outcomes: dict[str, int] = {}
    for (_, outcome), number in counts.outcomes.items():
        outcomes[outcome] = outcomes.get(outcome, 0) + number
    return {
        "policy": _POLICY.value,
        "requests": outcomes,
        "resent": counts.resent,
        "resumed": counts.resumed,
        "lost_answers": counts.lost_answers,
        "prompt_tokens": counts.prompt_tokens,
        "cached_tokens": counts.cached_tokens,
        "output_tokens": counts.output_tokens,
    }


if __name__ == "__main__":
    job.main(run)
