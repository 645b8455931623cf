"""Serves a model over HTTP with OpenAI's protocol, until Ctrl-C or SIGTERM.

    python -m launch.serve                                  the small reasoning model that comes with jaxstack
    python -m launch.serve --model=FOLDER --port=8000       a Hugging Face folder with safetensors and tokenizer.json

    python -m launch.serve --model=FOLDER --offload=auto --device_budget_gb=12         a model larger than its device

    python -m launch.serve --semantic_cache --delta=0.02    answer from earlier answers, wrongly in 2 % of cases at most

Then, for instance:

    curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
         -d '{"messages": [{"role": "user", "content": "..."}]}'

`/health` answers 503 while the steps are compiled and 200 afterwards; `/metrics` is for Prometheus.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.engine.memory.swap import SwapConfig
from jaxstack.runtime.errors import UserError
from jaxstack.serving import ServerConfig, serve
from jaxstack.serving.http_server import listen
from launch import cache_flags, engine_flags, job, offload_flags

_SERVER = ServerConfig()

_NAME = flags.DEFINE_string("served_model_name", None, "what clients call the model; by default the folder's name")
_HOST = flags.DEFINE_string("host", _SERVER.host, "address to listen on; 0.0.0.0 lets other machines in")
_PORT = flags.DEFINE_integer("port", _SERVER.port, "port to listen on; 0 takes a free one")
_API_KEY = flags.DEFINE_string("api_key", None, "key that clients must send as bearer token")
_API_KEYS = flags.DEFINE_string(
    "api_keys", None, "file with a line NAME=KEY for each further key; requests count as those of its owner NAME"
)
_TRUST = flags.DEFINE_bool(
    "trust_client_id",
    _SERVER.trust_client_id,
    "count requests under the name in the header X-Client-Id; only where nobody but a gateway can reach the server",
)
_ORIGINS = flags.DEFINE_list("allowed_origins", [], "origins of web pages that may call the server")
_BODY = flags.DEFINE_integer("max_body_bytes", _SERVER.max_body_bytes, "largest request body")
_STREAMS = flags.DEFINE_integer("max_streams", _SERVER.max_streams, "requests answered at once; more get 429")
_DRAIN = flags.DEFINE_float("drain_timeout_s", _SERVER.drain_timeout_s, "time for running answers on shutdown, seconds")
_TIMEOUT = flags.DEFINE_float("request_timeout_s", None, "longest time for one answer, seconds")
_POOLING: Any = flags.DEFINE_enum(
    "pooling", _SERVER.pooling, ["last", "mean"], "what an embedding is made of: the last token or the mean over all"
)
_HOST_GB = flags.DEFINE_float(
    "kv_host_gb", 0.0, "host memory for keys and values beyond the device's, streamed past the layers; 0 is off"
)
_HOST_SHARE = flags.DEFINE_string(
    "kv_host_share", "auto", "share of keys and values on the host: a number from 0 to 0.97, or auto: what hides"
)
_TRACE = flags.DEFINE_string("record_trace", None, "file for a trace of the requests, without text (launch.replay)")
flags.adopt_module_key_flags(engine_flags)
flags.adopt_module_key_flags(offload_flags)
flags.adopt_module_key_flags(cache_flags)


def _api_keys(file: str | None) -> dict[str, str]:
    """Keys by owner, from lines NAME=KEY; empty ones and those that begin with # are skipped."""
    if file is None:
        return {}
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise job.BadUsage(f"--api_keys: {file} cannot be read: {error}") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, _, key = (part.strip() for part in line.partition("="))
        if not line.strip() or line.startswith("#"):
            continue
        if not name or not key or name in keys:
            found = "the name a second time" if name in keys else "no name or no key"
            raise job.BadUsage(f"--api_keys: {file}:{number}: found {found}, expected NAME=KEY")
        keys[name] = key
    return keys


def _swap() -> SwapConfig | None:
    """Whether, and how, keys and values are swapped."""
    if _HOST_GB.value < 0:
        raise job.BadUsage(f"--kv_host_gb: found {_HOST_GB.value}, expected a number >= 0")
    share: float | None = None
    if _HOST_SHARE.value != "auto":
        try:
            share = float(_HOST_SHARE.value)
        except ValueError:
            raise job.BadUsage(f"--kv_host_share: found {_HOST_SHARE.value!r}, expected auto or a number") from None
    if not _HOST_GB.value:
        if share is not None:
            raise job.BadUsage("--kv_host_share: found a number, expected --kv_host_gb > 0 with it")
        return None
    try:
        return SwapConfig(host_bytes=int(_HOST_GB.value * 1e9), adaptive=share is None, host_share=share)
    except UserError as error:
        raise job.BadUsage(f"--kv_host_share: {error}") from None


def run() -> dict[str, Any]:
    folder = engine_flags.model_folder()
    config = ServerConfig(
        host=_HOST.value,
        port=_PORT.value,
        model_name=_NAME.value or folder.resolve().name,
        api_key=_API_KEY.value,
        api_keys=_api_keys(_API_KEYS.value),
        trust_client_id=_TRUST.value,
        allowed_origins=tuple(_ORIGINS.value),
        max_body_bytes=_BODY.value,
        max_streams=_STREAMS.value,
        drain_timeout_s=_DRAIN.value,
        request_timeout_s=_TIMEOUT.value,
        pooling=_POOLING.value,
        tool_parser=engine_flags.TOOLS.value,
        reasoning_parser=engine_flags.REASONING.value,
    )
    settings, plan = offload_flags.with_offload(engine_flags.engine_config(kv_swap=_swap()), folder)
    if plan is not None:
        print(plan, file=sys.stderr, flush=True)
    adapters = {name: Path(adapter) for name, adapter in engine_flags.adapters()}
    # The address first: loading takes a while, and a port in use should be known before.
    with contextlib.closing(listen(config)) as listener, cache_flags.semantic_cache(folder, adapters) as cache:
        engine = engine_flags.load_engine(folder, settings)
        cache_flags.let_judge(cache, engine)
        for note in engine.notes:
            print(note, file=sys.stderr, flush=True)

        def on_ready(url: str) -> None:
            print(f"serving {config.model_name} at {url}/v1", flush=True)

        try:
            with engine_flags.recorded(engine, _TRACE.value):
                serve(engine, config, cache=cache, listener=listener, on_ready=on_ready)
        except RuntimeError as error:
            raise UserError(f"the engine has died ({error}); its log tells more") from error
        answered = {} if cache is None else {"cache": cache.stats().as_json()}
    stats = engine.stats()
    return (
        offload_flags.summary(engine)
        | answered
        | {
            "model": config.model_name,
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.generation_tokens,
            "requests": sum(stats.finished.values()),
            "recompilations": stats.recompilations,
        }
    )


if __name__ == "__main__":
    job.main(run)
