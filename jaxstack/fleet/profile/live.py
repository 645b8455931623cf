"""Profiles measured at a running endpoint, any that speaks OpenAI: the highest rate of Poisson arrivals of each size.

A probe sends requests of one size for a while: prompts of random token ids (a constant prompt would be answered from a
prefix cache), answers of exactly so many tokens (`ignore_eos`), streamed. It passes if enough requests keep the
objective and no queue grows. Tokens are counted by the endpoint, not by its chunks, and time per output token is an
answer's mean. Every bucket that is finished is written to a journal, and not measured again.
"""

import asyncio
import dataclasses
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from jaxstack.fleet.profile.bracketing import Found, ProbeResult, highest_rate
from jaxstack.fleet.profile.lengths import LengthGrid
from jaxstack.fleet.profile.throughput import LatencyObjective, ThroughputProfile
from jaxstack.runtime.errors import UserError

# Beside what the objective allows: rates are random, and so is what is under way at the end of a probe.
_GROWTH = 0.03


@dataclasses.dataclass(frozen=True)
class EndpointProfileConfig:
    """How an endpoint is measured.

    Args:
      base_url: with the "/v1".
      name: what this type of replica is called in the profile.
      model: its name at the endpoint; by default the first that it lists.
      grid: sizes, measured at their upper corners.
      probe_s: a probe lasts so long, or ten times what a request takes, whichever is longer.
      least_requests: that a probe must send; it lasts longer for them if need be.
      tolerance: of the rates found.
      highest_rps: no higher rate is tried.
      lowest_rps: the lowest that counts as serving.
      vocab_size: prompts are of token ids below this.
      timeout_s: for one request.
    """

    base_url: str
    name: str
    grid: LengthGrid
    objective: LatencyObjective
    model: str | None = None
    api_key: str | None = None
    probe_s: float = 60.0
    least_requests: int = 20
    tolerance: float = 0.05
    highest_rps: float = 1000.0
    lowest_rps: float = 0.01
    vocab_size: int = 10_000
    timeout_s: float = 600.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url: found {self.base_url!r}, expected http://HOST:PORT/v1")
        for name in ("probe_s", "tolerance", "highest_rps", "lowest_rps", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}: found {getattr(self, name)}, expected a positive number")
        if self.least_requests < 1 or self.vocab_size < 8:
            found = f"{self.least_requests} and {self.vocab_size}"
            raise UserError(f"least_requests, vocab_size: found {found}, expected at least 1 and 8")


@dataclasses.dataclass(slots=True)
class Answer:
    """One request: when it was sent, had its first and its last token; and what went wrong, if anything did."""

    sent_s: float
    first_s: float = math.nan
    end_s: float = math.nan
    tokens: int = 0
    error: str = ""
    status: int = 0

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_s) / (self.tokens - 1) if self.tokens > 1 else 0.0


class Endpoint:
    """Sends requests of given sizes. Use as an asynchronous context manager."""

    def __init__(self, config: EndpointProfileConfig):
        self.config = config
        self._draw = random.Random(config.seed)
        headers = {"authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        # A proxy from the environment must not come between us and the endpoint.
        self._http = httpx.AsyncClient(
            base_url=config.base_url.rstrip("/"), headers=headers, limits=limits, timeout=config.timeout_s,
            trust_env=False,
        )  # fmt: skip
        self._model = config.model

    async def __aenter__(self) -> "Endpoint":
        try:
            answer = await self._http.get("/models")
            answer.raise_for_status()
            self._model = self._model or answer.json()["data"][0]["id"]
        except httpx.HTTPStatusError as error:
            await self._http.aclose()
            raise UserError(f"{self.config.base_url}: /models is {error.response.status_code}, expected 200") from None
        except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
            await self._http.aclose()
            what = f"cannot be reached ({type(error).__name__})"
            raise UserError(f"{self.config.base_url}: {what}, expected a server that speaks OpenAI") from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ask(self, input_tokens: int, output_tokens: int) -> Answer:
        """One request; what goes wrong is in the answer."""
        body = {
            "model": self._model,
            "prompt": [self._draw.randrange(3, self.config.vocab_size) for _ in range(input_tokens)],
            "max_tokens": output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = Answer(time.perf_counter())
        try:
            async with self._http.stream("POST", "/completions", json=body) as response:
                answer.status = response.status_code
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    answer.error = f"{response.status_code}: {_message(text)}"
                    return answer
                await self._read(response, answer)
        except (httpx.HTTPError, ValueError) as error:
            answer.error = type(error).__name__
        if not answer.error and answer.tokens != output_tokens:
            answer.error = f"{answer.tokens} tokens in the place of {output_tokens}: does it take ignore_eos?"
        return answer

    async def _read(self, response: httpx.Response, answer: Answer) -> None:
        async for line in _lines(response):
            data = line.removeprefix(b"data:").strip()
            if not line.startswith(b"data:") or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                answer.error = _message(data.decode())
                return
            now = time.perf_counter()
            if event.get("choices"):
                answer.end_s = now
                if math.isnan(answer.first_s):
                    answer.first_s = now
            if event.get("usage"):
                answer.tokens = int(event["usage"]["completion_tokens"])

    async def probe(self, input_tokens: int, output_tokens: int, rate_rps: float, alone_s: float) -> ProbeResult:
        """Poisson arrivals of one size at a rate, after a warm-up of two durations.

        Args:
          alone_s: what such a request takes alone.
        """
        config, objective = self.config, self.config.objective
        warmup_s = 2 * alone_s
        counted_s = max(config.probe_s, 10 * alone_s, config.least_requests / rate_rps)
        began = time.perf_counter()
        open_, answers, tasks = 0, [], []
        area = under_way_at_start = 0.0
        last = began
        # More than this under way, and the queue is known to grow: each would keep the objective alone.
        crowded = 50 + 20 * rate_rps * alone_s

        def count(change: int) -> None:
            nonlocal open_, area, last
            now = time.perf_counter()
            since = max(last, began + warmup_s)
            if now > since:
                area += open_ * (now - since)
            last, open_ = now, open_ + change

        async def one() -> None:
            count(1)
            answer = await self.ask(input_tokens, output_tokens)
            count(-1)
            answers.append(answer)

        next_s, end = began, began + warmup_s + counted_s
        started = False
        try:
            while next_s < end and open_ < crowded:
                if not started and next_s >= began + warmup_s:
                    started, under_way_at_start = True, open_
                await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
                tasks.append(asyncio.create_task(one()))
                next_s += self._draw.expovariate(rate_rps)
            if open_ < crowded:
                await asyncio.sleep(max(0.0, min(end, next_s) - time.perf_counter()))
            count(0)
            span, left = time.perf_counter() - began - warmup_s, open_
            if open_ >= crowded:
                return ProbeResult(rate_rps, False, f"{open_} requests pile up", len(tasks), concurrency=float(open_))
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        counted = [answer for answer in answers if answer.sent_s >= began + warmup_s] or answers
        if counted and counted[-1].error and not counted[-1].status:  # overloaded, or gone? One more says which
            await self.must_answer(input_tokens, output_tokens)
        refused = [answer for answer in counted if 400 <= answer.status < 500 and answer.status != 429]
        if refused:
            return ProbeResult(rate_rps, False, refused[0].error, len(counted), possible=False)
        good = [answer for answer in counted if not answer.error]
        failed = next((answer.error for answer in counted if answer.error), "")
        if not good:
            return ProbeResult(rate_rps, False, failed, len(counted))
        ttft = np.array([answer.first_s - answer.sent_s for answer in good])
        tpot = np.array([answer.tpot_s for answer in good])
        kept = (tpot <= objective.tpot_s) & (True if objective.ttft_s is None else ttft <= objective.ttft_s)
        attainment = float(kept.sum() / len(counted))
        concurrency = area / span if span > 0 else 0.0
        why = ""
        if attainment < objective.quantile:
            why = failed or f"{attainment:.1%} of {len(counted)} requests keep the objective"
        elif left - under_way_at_start > _GROWTH * len(counted) + 3 * math.sqrt(max(1.0, concurrency)):
            why = f"the queue grew from {under_way_at_start:.0f} to {left} requests"
        return ProbeResult(
            rate_rps,
            not why,
            why,
            len(counted),
            attainment,
            concurrency,
            float(np.percentile(ttft, 99)),
            float(np.percentile(tpot, 50)),
            float(np.percentile(tpot, 99)),
        )

    async def must_answer(self, input_tokens: int, output_tokens: int) -> None:
        """Raises UserError where the endpoint does not answer at all: nothing is known of its rates then."""
        answer = await self.ask(input_tokens, output_tokens)
        if answer.error and not answer.status:
            where = self.config.base_url
            raise UserError(f"{where}: was lost while measuring ({answer.error}); started again, it goes on here")

    async def alone(self, input_tokens: int, output_tokens: int) -> Answer:
        """The second of two requests, one after the other: the first may find things cold."""
        first = await self.ask(input_tokens, output_tokens)
        return first if first.error else await self.ask(input_tokens, output_tokens)


class Journal:
    """The buckets that are finished, a line each.

    Raises:
      UserError: the file is of a profile with other settings, or says of which no more.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self._path = path
        self.buckets: dict[tuple[int, int], dict[str, Any]] = {}
        self._settings = json.loads(json.dumps(settings))
        known = False
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # torn by a kill
            if not isinstance(row, dict):
                continue
            if "settings" in row and row["settings"] != self._settings:
                raise UserError(f"{path}: found a profile with other settings; delete it or choose another workdir")
            known = known or "settings" in row
            if "bucket" in row:
                self.buckets[tuple(row["bucket"])] = row
        if self.buckets and not known:
            raise UserError(f"{path}: found no line with settings; delete it or choose another workdir")
        if not known:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append({"settings": self._settings})

    def add(self, bucket: tuple[int, int], row: Mapping[str, Any]) -> None:
        self.buckets[bucket] = {"bucket": list(bucket), **row}
        self._append(self.buckets[bucket])

    def _append(self, row: Mapping[str, Any]) -> None:
        torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n") and self._path.stat().st_size > 0
        with self._path.open("a") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")
            file.flush()


async def measure_profile(
    config: EndpointProfileConfig,
    journal_file: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    advance: Callable[[], None] = lambda: None,
) -> ThroughputProfile:
    """Measures every bucket, or goes on with it; short prompts first, since what a shorter prompt cannot, a longer one
    cannot either, and its rate is where the search for the longer one begins.

    Args:
      journal_file: where finished buckets are kept.
      say, advance: told what each bucket came to, and that it is done.

    Raises:
      UserError: the endpoint cannot be reached, or its journal is of other settings.
    """
    settings = dataclasses.asdict(config)
    del settings["api_key"]
    journal = Journal(journal_file, settings)
    grid = config.grid
    rates, concurrency = np.zeros(grid.shape), np.zeros(grid.shape)
    async with Endpoint(config) as endpoint:
        for j, written in enumerate(grid.output_edges_tokens):
            for i, read in enumerate(grid.input_edges_tokens):
                if (i, j) not in journal.buckets:
                    shorter = rates[i - 1, j] if i else None
                    row = await _measure_bucket(endpoint, read, written, shorter)
                    journal.add((i, j), row)
                    top = f"{row['rate_rps']:.3g}/s with {row['concurrency']:.1f} under way"
                    say(f"{grid.name(i, j)}: {top if row['rate_rps'] else 'cannot serve: ' + str(row['why'])}")
                rates[i, j] = journal.buckets[i, j]["rate_rps"]
                concurrency[i, j] = journal.buckets[i, j]["concurrency"]
                advance()
    return ThroughputProfile(
        grid,
        {config.name: rates},
        config.objective,
        {config.name: np.where(rates > 0, np.maximum(concurrency, 1.0), 0.0)},
        "measured",
        {"endpoint": config.base_url, "probe_s": f"{config.probe_s:g}", "points": "upper corners"},
    )


async def _measure_bucket(endpoint: Endpoint, read: int, written: int, shorter: float | None) -> dict[str, Any]:
    """Rate, concurrency and all probes of one size; `shorter` is the rate that a shorter prompt attained."""
    config = endpoint.config
    nothing = {"rate_rps": 0.0, "concurrency": 0.0, "probes": []}
    if shorter == 0:
        return {**nothing, "why": "a shorter prompt cannot be served either"}
    alone = await endpoint.alone(read, written)
    if alone.status == 0 and alone.error:
        raise UserError(f"{config.base_url}: was lost while measuring ({alone.error}); started again, it goes on here")
    if alone.error:
        return {**nothing, "why": alone.error}
    late = config.objective.ttft_s is not None and alone.first_s - alone.sent_s > config.objective.ttft_s
    if alone.tpot_s > config.objective.tpot_s or late:
        return {**nothing, "why": f"alone it takes {1e3 * alone.tpot_s:.1f} ms a token"}
    alone_s = max(1e-3, alone.end_s - alone.sent_s)
    found: Found = await highest_rate(
        lambda rate: endpoint.probe(read, written, rate, alone_s),
        start_rps=shorter or 2 / alone_s,
        lowest_rps=min(config.lowest_rps, 0.5 / alone_s, config.highest_rps),
        highest_rps=config.highest_rps,
        tolerance=config.tolerance,
    )
    return {
        "rate_rps": found.rate_rps,
        "concurrency": found.concurrency,
        "limited": found.limited,
        "alone_s": alone_s,
        "why": found.tried[-1].why,
        "probes": [result.as_json() for result in found.tried],
    }


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines of a stream of events. They end with a line feed and nothing else: the client's own `aiter_lines` also ends
    them at the line separators of Unicode, which may stand in an answer's text.
    """
    rest = b""
    async for piece in response.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _message(text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[:200]
