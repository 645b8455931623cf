"""Both sides in turn on one machine: trials that choose the peer's best form of each mode, then rounds that are
counted.

While one side works the other does nothing: peers are frozen by signal (their OpenMP threads would spin otherwise), our
engine waits on a condition, and what it used meanwhile is recorded. Both models stay loaded all the time.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from jaxstack.runtime.errors import UserError
from launch.peers import PeerProcess
from launch.serve_benchmark.machine import LoadMeter
from launch.serve_benchmark.ours import Measured
from launch.serve_benchmark.workload import Requests, Workload


@dataclasses.dataclass(frozen=True)
class PeerMode:
    """One way of asking a peer.

    Attributes:
      kind: the method of its program that answers.
      title: what is special about it, in words.
      settings: that method's further arguments.
      wait_policy: OMP_WAIT_POLICY, what its idle threads do.
    """

    kind: str
    title: str
    settings: dict[str, Any]
    wait_policy: str = "PASSIVE"

    @property
    def label(self) -> str:
        return f"{self.kind}, {self.title}" + (", spinning threads" if self.wait_policy == "ACTIVE" else "")


@dataclasses.dataclass(frozen=True)
class Run:
    """One measured run of one contestant.

    Attributes:
      foreign_cores: processor time per second that neither side used.
      idle_cores: processor time per second that our own process used while a peer worked; 0 for our own runs.
    """

    name: str
    variant: int
    measured: Measured
    foreign_cores: float
    idle_cores: float = 0.0

    @property
    def wall_s(self) -> float:
        return self.measured.wall_s


def fastest(trials: Sequence[tuple[PeerMode, Run]], *, quiet: bool) -> dict[str, PeerMode]:
    """Of every kind that was tried, the mode of least wall time; of least CPU time where other programs ran, too."""
    best: dict[str, tuple[float, PeerMode]] = {}
    for mode, run in trials:
        seconds = run.wall_s if quiet else run.measured.cpu_s
        if mode.kind not in best or seconds < best[mode.kind][0]:
            best[mode.kind] = (seconds, mode)
    return {kind: mode for kind, (_, mode) in best.items()}


class Progress:
    """Lines on stderr: what was measured, what is next, how long to go by the mean so far."""

    def __init__(self, total: int):
        self._total, self._done, self._began = total, 0, time.perf_counter()

    def done(self, line: str, steps: int = 1) -> None:
        self._done += steps
        used = time.perf_counter() - self._began
        left = used / max(1, self._done) * max(0, self._total - self._done)
        to_go = f", about {left:.0f} s to go" if self._done else ""
        print(f"[{self._done}/{self._total}, {used:.0f} s{to_go}] {line}", file=sys.stderr, flush=True)


class Contest:
    """Runs contestants one at a time.

    Args:
      ours: name -> function that answers requests in this process; the first is the one that counts.
      open_peer: starts a peer with the given wait policy, model loaded; called once for each policy.
      workload: where requests come from.
      progress: told of every run.
    """

    def __init__(
        self,
        ours: dict[str, Callable[[Requests], Measured]],
        open_peer: Callable[[str], PeerProcess],
        workload: Workload,
        progress: Progress,
    ):
        self.ours, self._open_peer, self._workload, self._progress = ours, open_peer, workload, progress
        self._peers: dict[str, PeerProcess] = {}

    def close(self) -> None:
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()

    def run_ours(self, name: str, variant: int) -> Run:
        """Variant `variant` of the requests by our contestant `name`."""
        requests = self._workload.draw(variant)
        with self._only(None), LoadMeter(self._processes) as meter:
            measured = self.ours[name](requests)
        run = Run(name, variant, measured, meter.foreign_cores)
        self._say(f"ours, {name}", run)
        return run

    def run_peer(self, mode: PeerMode, variant: int) -> Run:
        """The same by a peer. Raises UserError if the peer cannot."""
        requests = self._workload.draw(variant)
        peer = self._peer(mode.wait_policy)
        with self._only(peer), LoadMeter(self._processes) as meter:
            answer = peer.ask(mode.kind, prompts=requests.prompts, max_tokens=requests.max_tokens, **mode.settings)
        measured = Measured(answer["wall_s"], answer["cpu_s"], answer["tokens"])
        run = Run(mode.kind, variant, measured, meter.foreign_cores, meter.own_cpu_s / meter.wall_s)
        self._say(mode.label, run)
        return run

    def trials(self, modes: Sequence[PeerMode], variant: int) -> list[tuple[PeerMode, Run]]:
        """Each mode once; one that fails is left out, and said so."""
        runs = []
        for mode in modes:
            try:
                runs.append((mode, self.run_peer(mode, variant)))
            except UserError as error:
                self._progress.done(f"{mode.label}: {error}")
        return runs

    def rounds(
        self,
        count: int,
        modes: Sequence[PeerMode],
        first_variant: int,
        between: Callable[[], object] = lambda: None,
    ) -> list[dict[str, Run]]:
        """`count` rounds in which every contestant works once, in an order that is turned around from round to round.

        Within a round our first contestant and all peers answer the same requests; our others have requests of their
        own, lest they find the prompts in the prefix cache. `between` is called before the first round and after each,
        with no contestant at work.
        """
        results = []
        self._alone(between)
        for r in range(count):
            variant = first_variant + r * len(self.ours)
            turns = [partial(self.run_ours, name, variant + i) for i, name in enumerate(self.ours)]
            turns += [partial(self.run_peer, mode, variant) for mode in modes]
            runs = [turn() for turn in (turns if r % 2 == 0 else turns[::-1])]
            results.append({run.name: run for run in runs})
            self._alone(between)
        return results

    def _alone(self, work: Callable[[], object]) -> None:
        with self._only(None):
            work()

    def keep(self, policies: set[str]) -> None:
        """Ends the peers with other wait policies."""
        for policy in self._peers.keys() - policies:
            self._peers.pop(policy).close()

    def _peer(self, policy: str) -> PeerProcess:
        if policy not in self._peers:
            self._peers[policy] = self._open_peer(policy)
        return self._peers[policy]

    def _processes(self) -> list[Any]:
        return [peer.process for peer in self._peers.values()]

    @contextlib.contextmanager
    def _only(self, chosen: PeerProcess | None) -> Iterator[None]:
        """Inside, no peer but `chosen` runs."""
        for peer in self._peers.values():
            if peer is not chosen:
                peer.freeze()
        if chosen is not None:
            chosen.thaw()
        try:
            yield
        finally:
            if chosen is not None:
                chosen.freeze()

    def _say(self, label: str, run: Run) -> None:
        tokens = sum(map(len, run.measured.tokens))
        self._progress.done(
            f"{label}: {run.wall_s:.2f} s, {run.measured.cpu_s:.2f} CPU s, {tokens / run.wall_s:.0f} tokens/s"
            + (f" (others used {run.foreign_cores:.1f} cores)" if run.foreign_cores > 0.1 else "")
        )
