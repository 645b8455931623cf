"""Whom our engine is compared with: the program that speaks for each peer, its environment, and the modes it has."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.peers import PeerProcess
from launch.peers.process import DEFAULT_INTERPRETER
from launch.serve_benchmark.contest import PeerMode
from launch.serve_benchmark.workload import Workload

_PROGRAMS = Path(__file__).parent.parent / "peers"
_THREADS = 2
_PAGE = 32


@dataclasses.dataclass(frozen=True)
class Opponent:
    """One peer.

    Attributes:
      name: what `--peer` calls it.
      program: its side of the benchmark, run by `interpreter`, which `make TARGET` provides.
      modes: what is tried of it for a workload.
    """

    name: str
    program: Path
    interpreter: str
    make_target: str
    modes: Callable[[Workload], list[PeerMode]]

    def open(
        self, interpreter: Path, folder: Path, workdir: Path, about: dict[str, Any], dtype: str, policy: str
    ) -> PeerProcess:
        """Starts the peer with OMP_WAIT_POLICY=`policy`, loads the model, finds the best number of threads.

        `about` receives its versions and number of threads.
        """
        peer = PeerProcess(
            [interpreter, self.program],
            log_file=workdir / f"{self.name}-{policy.lower()}.log",
            environment={
                "OMP_WAIT_POLICY": policy,
                "OMP_NUM_THREADS": str(_THREADS),
                "TOKENIZERS_PARALLELISM": "false",
            },
            name=self.name,
        )
        try:
            loaded = peer.ask("load", folder=str(folder.resolve()), threads=_THREADS, dtype=dtype)
            threads = peer.ask("choose_threads", candidates=[_THREADS, 1])
        except BaseException:
            peer.close()
            raise
        about["versions"] = loaded["versions"]
        about.setdefault("threads", {})[policy] = threads["threads"]
        return peer


def transformers_modes(workload: Workload) -> list[PeerMode]:
    """What is tried of transformers: the sizes and orders of static batches, and the settings of continuous batching.

    Sizes that it would guess for a GPU are given. Of what cannot win the shared-prefix workload (static batches compute
    every prompt whole) only the likeliest is tried there. `grouped` is an option of its `sdpa` attention. Left out:
    `eager` attention (1.5 times as long as the best) and batches of 16 sorted by prompt length (1.1 times as long as by
    output length).
    """
    whole, sharing = workload.requests, bool(workload.shared_prefix)
    static = [(batch, order, True) for batch, order in ((8, "output"), (16, "output")) if batch < whole]
    static = ([] if sharing else static) + [(whole, "given", True), (whole, "given", False)]
    modes = [
        PeerMode(
            "generate",
            f"batches of {batch}"
            + (f", longest {order} first" if batch < whole else "")
            + (", grouped" if grouped else ""),
            {"batch": batch, "order": order, "grouped": grouped},
        )
        for batch, order, grouped in static
    ]
    base = {
        "order": "output",
        "page_size": _PAGE,
        "num_blocks": whole * -(-workload.window // _PAGE + 1),
        "max_requests_per_batch": whole,
        "allow_block_sharing": sharing,
    }
    paged: list[tuple[str, dict[str, Any]]] = [
        ("sdpa grouped, 512 tokens a step", {"attention": "sdpa", "grouped": True, "max_batch_tokens": 512}),
        ("sdpa grouped, 1024 tokens a step", {"attention": "sdpa", "grouped": True, "max_batch_tokens": 1024}),
        ("sdpa, 512 tokens a step", {"attention": "sdpa", "max_batch_tokens": 512}),
    ]
    if whole > 16:
        half = {"attention": "sdpa", "grouped": True, "max_batch_tokens": 512, "max_requests_per_batch": whole // 2}
        paged.append((f"sdpa grouped, 512 tokens a step, {whole // 2} requests at once", half))
    return modes + [PeerMode("generate_batch", title, {**base, **settings}) for title, settings in paged]


def llama_cpp_modes(workload: Workload) -> list[PeerMode]:
    """What is tried of llama.cpp: one shared batch of all sequences, with its server's sizes and switches."""
    base = {"window": workload.window, "sequences": workload.requests}
    tried: list[tuple[str, dict[str, Any]]] = [
        ("512 tokens a step", {"batch": 512, "micro_batch": 512}),
        ("512 tokens a step, flash attention", {"batch": 512, "micro_batch": 512, "flash": True}),
    ]
    if workload.requests > 1:
        tried.append(("512 tokens a step, one cache", {"batch": 512, "micro_batch": 512, "unified": True}))
        tried.append(("2048 tokens in steps of 512", {"batch": 2048, "micro_batch": 512}))
    return [PeerMode("shared_batch", title, {**base, **settings}) for title, settings in tried]


OPPONENTS = {
    opponent.name: opponent
    for opponent in (
        Opponent("transformers", _PROGRAMS / "transformers_serve.py", DEFAULT_INTERPRETER, "peers", transformers_modes),
        Opponent(
            "llama_cpp",
            _PROGRAMS / "llama_cpp_serve.py",
            ".venv-llama-cpp/bin/python",
            "peer-llama-cpp",
            llama_cpp_modes,
        ),
    )
}
