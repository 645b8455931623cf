"""Schroeder et al., "Adaptive Semantic Prompt Caching with VectorQ", later "vCache: Verified Semantic Prompt Caching"
(arXiv 2502.03771), in miniature: hits and wrong hits of a semantic cache under static thresholds, the paper's rule and
ours, on streams whose right answers are known. Minutes on two cores.

Every stream runs with several seeds and bounds on the error. `--data=FILES` takes streams from files in the paper's
column layout (prompt, id_set, emb_NAME, response_NAME; Parquet, CSV, JSON or JSON lines); with `--scale=full` whole
files are meant.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from jaxstack.runtime.errors import UserError
from launch.vectorq_study.study import run_study
from launch.vectorq_study.tasks import StudyConfig

_DEFAULT = StudyConfig()
_REQUESTS = flags.DEFINE_integer("vectorq_requests", _DEFAULT.requests, "of each stream")
_SEEDS = flags.DEFINE_integer("vectorq_seeds", _DEFAULT.seeds, "of each stream", lower_bound=1)
_DELTAS = flags.DEFINE_list("deltas", list(map(str, _DEFAULT.deltas)), "bounds on wrong answers a request")
_STREAMS = flags.DEFINE_list("streams", list(_DEFAULT.streams), "which made-up streams")
_DATA = flags.DEFINE_list("data", [], "files with streams, in place of made-up ones")
_EMBEDDING = flags.DEFINE_string("data_embedding", None, "NAME of the column emb_NAME, where there are several")
_RESPONSE = flags.DEFINE_string("data_response", None, "NAME of the column response_NAME, where there are several")
_WORKERS = flags.DEFINE_integer("vectorq_workers", 2, "streams replayed side by side", lower_bound=1)


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or goes on with it. Returns the summary."""
    if scale == "full" and not _DATA.value:
        raise UserError(
            "--scale=full: found no --data, expected files with the paper's streams (prompt, id_set, emb_NAME); "
            "none are shipped"
        )
    try:
        deltas = tuple(float(delta) for delta in _DELTAS.value)
    except ValueError:
        raise UserError(f"--deltas: found {','.join(_DELTAS.value)!r}, expected numbers", exit_code=2) from None
    config = StudyConfig(
        requests=_REQUESTS.value,
        seeds=1 if scale == "full" else _SEEDS.value,
        deltas=deltas,
        streams=tuple(_STREAMS.value),
        data=tuple(_DATA.value),
        embedding=_EMBEDDING.value,
        response=_RESPONSE.value,
    )
    return run_study(config, workdir, workers=_WORKERS.value)
