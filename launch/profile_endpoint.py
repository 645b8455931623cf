"""What one replica sustains: measures a running endpoint, any that speaks OpenAI, and writes a profile for
launch.allocate.

    python -m launch.serve --port=8001 &
    python -m launch.profile_endpoint --base_url=http://127.0.0.1:8001/v1 --name=L4 --price=0.70 --workdir=work/l4
    python -m launch.allocate --config.profile=work/l4/profile.json,work/a100/profile.json

For every size (an input and an output length) the highest rate of Poisson arrivals is found at which the objective is
kept and no queue grows. With ten input and six output lengths and probes of a minute that is some hours; killed and
started again with the same workdir it goes on. The server must take prompts of token ids and `ignore_eos`, as ours,
vLLM and SGLang do. The workdir gets journal.jsonl, profile.json, aibrix.json (for AIBrix's GPU optimizer) and
summary.json.
"""

import asyncio
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.fleet.profile.files import save_aibrix_profile, save_profile
from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.live import EndpointProfileConfig, measure_profile
from jaxstack.fleet.profile.throughput import AcceleratorType, LatencyObjective
from jaxstack.runtime.metrics import write_summary
from jaxstack.runtime.progress import Progress
from launch import job

_URL = flags.DEFINE_string("base_url", "http://127.0.0.1:8000/v1", "of the endpoint, with the /v1")
_NAME = flags.DEFINE_string("name", "replica", "what this type of replica is called in plans")
_PRICE = flags.DEFINE_float("price", 1.0, "dollars an hour of one replica", lower_bound=0.0)
_COUNT = flags.DEFINE_integer("max_count", None, "replicas that can be had; default: any number", lower_bound=0)
_MODEL = flags.DEFINE_string("model", None, "its name at the endpoint; default: the first that it lists")
_KEY = flags.DEFINE_string("api_key", None, "sent as bearer token")
_INPUTS = flags.DEFINE_list("input_edges", ["25", "100", "250", "500", "1000", "2000"], "input lengths, tokens")
_OUTPUTS = flags.DEFINE_list("output_edges", ["25", "100", "250", "500", "1000"], "output lengths, tokens")
_TPOT = flags.DEFINE_float("tpot_s", 0.12, "mean time per output token that requests must keep, seconds")
_TTFT = flags.DEFINE_float("ttft_s", None, "time to the first token that they must keep, too; default: any")
_QUANTILE = flags.DEFINE_float("quantile", 0.99, "share of the requests that must")
_PROBE = flags.DEFINE_float("probe_s", 60.0, "seconds of a probe, at least")
_TOLERANCE = flags.DEFINE_float("tolerance", 0.05, "of the rates")
_HIGHEST = flags.DEFINE_float("highest_rps", 1000.0, "no higher rate is tried")
_VOCAB = flags.DEFINE_integer("vocab_size", 10_000, "prompts are of token ids below this", lower_bound=8)
_SEED = flags.DEFINE_integer("seed", 0, "of arrivals and prompts")
_WORKDIR = flags.DEFINE_string("workdir", "work/profile", "where everything goes; measuring found there is continued")


def edges(flag: str, texts: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(text) for text in texts)
    except ValueError:
        raise job.BadUsage(f"--{flag}: found {','.join(texts)!r}, expected whole numbers of tokens") from None


def run() -> dict[str, Any]:
    workdir = Path(_WORKDIR.value)
    config = EndpointProfileConfig(
        base_url=_URL.value,
        name=_NAME.value,
        grid=LengthGrid(edges("input_edges", _INPUTS.value), edges("output_edges", _OUTPUTS.value)),
        objective=LatencyObjective(_TPOT.value, _TTFT.value, _QUANTILE.value),
        model=_MODEL.value,
        api_key=_KEY.value,
        probe_s=_PROBE.value,
        tolerance=_TOLERANCE.value,
        highest_rps=_HIGHEST.value,
        vocab_size=_VOCAB.value,
        seed=_SEED.value,
    )
    rows, columns = config.grid.shape
    with Progress(rows * columns, f"profile {config.name}", unit="size") as progress:
        profile = asyncio.run(
            measure_profile(config, workdir / "journal.jsonl", say=progress.say, advance=progress.advance)
        )
    kind = AcceleratorType(config.name, _PRICE.value, _COUNT.value)
    save_profile(workdir / "profile.json", profile, [kind])
    save_aibrix_profile(workdir / "aibrix.json", profile, kind)
    rates = profile.max_rate_rps[config.name]
    summary = {
        "name": config.name,
        "sizes": int(rates.size),
        "served": int((rates > 0).sum()),
        "max_rate_rps": rates.round(4).tolist(),
        "profile": str(workdir / "profile.json"),
    }
    write_summary(workdir, summary)
    return summary


if __name__ == "__main__":
    job.main(run)
