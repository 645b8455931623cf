"""Many minutes of mixed load on one server, and nothing may go wrong: `python -m launch.soak --seconds=600`.

Clients ask through HTTP for answers of all lengths, greedy and seeded, alone and several at a time, some under LoRA
adapters that are loaded and unloaded meanwhile, and some hang up half-way. The engine is in batch-invariant mode with
speculation. Every minute the load pauses, and then

    every page is free, the prefix cache's, or somebody's: the scheduler's own books are checked, page by page;
    nothing was compiled since the warm-up;
    the process has not grown (a line through its resident size, the start left out).

In the end every question is asked once more of a fresh engine without prefix cache, overlap or speculation, one at a
time: the answers must be the same tokens.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import openai
import psutil
from absl import flags
from tqdm import tqdm

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.embedded import embedded_model
from jaxstack.models.lora import LoraConfig, adapter_factors, attach, set_adapters
from jaxstack.models.peft_format import save_peft
from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning.countdown import held_out
from jaxstack.runtime.errors import UserError
from jaxstack.serving import BackgroundServer
from jaxstack.serving.config import ServerConfig
from launch import job

_SECONDS = flags.DEFINE_float("seconds", 600.0, "how long the load lasts", lower_bound=1.0)
_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder; default: the embedded Countdown model")
_CLIENTS = flags.DEFINE_integer("clients", 24, "requests under way at a time", lower_bound=1)
_PAUSE_S = flags.DEFINE_float(
    "check_every_s", 60.0, "the load pauses so often for the books to be checked", lower_bound=0.5
)
_SOLO = flags.DEFINE_integer("solo", 1500, "answers asked again alone, at most", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "of the traffic")
_WORKDIR = flags.DEFINE_string("workdir", "work/soak", "where adapters, summary.json and soak.png go")

_ADAPTERS = 5
_LOADED_AT_ONCE = 2
# Growth of the resident size over the whole load, as a share of it, that still counts as flat: allocators breathe.
_FLAT = 0.02


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked: a prompt of the pool, under an adapter ("" for none), with one of the ways of sampling."""

    prompt: int
    way: int
    adapter: str


WAYS: tuple[dict[str, Any], ...] = (
    {"max_tokens": 1, "temperature": 0.0},
    {"max_tokens": 24, "temperature": 0.0},
    {"max_tokens": 150, "temperature": 0.0},
    {"max_tokens": 60, "temperature": 0.8, "top_p": 0.9, "seed": 7},
    {"max_tokens": 60, "temperature": 1.0, "top_k": 12, "min_p": 0.02, "seed": 8, "n": 3},
    {"max_tokens": 60, "temperature": 0.0, "frequency_penalty": 0.4, "presence_penalty": 0.2},
)
"""Ways of sampling, as `SamplingParams` takes them; all of them determined by their seeds."""


class Watch:
    """The resident size of this process over time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.bytes: list[int] = []
        self._process, self._began = psutil.Process(), time.perf_counter()

    def look(self) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        self.bytes.append(self._process.memory_info().rss)

    def growth(self, settled: float = 0.25) -> float:
        """Growth along the best line, as a share of the size; the first `settled` of the time is left out."""
        start = int(len(self.bytes) * settled)
        seconds, sizes = self.seconds[start:], self.bytes[start:]
        if len(sizes) < 3:
            return 0.0
        slope = np.polyfit(seconds, sizes, 1)[0]
        return float(slope * (seconds[-1] - seconds[0]) / np.mean(sizes))


class Traffic:
    """The clients. `open` is cleared while the load pauses."""

    def __init__(self, server: BackgroundServer, prompts: list[list[int]], adapters: Mapping[str, Path], seed: int):
        self.answers: dict[Question, list[list[int]]] = {}
        self.finished = self.hung_up = self.swaps = self.not_there = 0
        self.conflicts: list[Question] = []
        self.loaded: list[str] = []
        self.open = asyncio.Event()
        self.under_way = 0
        self._server, self._prompts, self._adapters = server, prompts, adapters
        self._random = random.Random(seed)
        self._over = False

    async def run(self, clients: int, until: float, check: "Callable[[Traffic], None]") -> None:
        """Load until the clock says `until`, with a pause for `check` every now and then."""
        self.open.set()
        async with (
            openai.AsyncOpenAI(base_url=self._server.base_url, api_key="none", max_retries=0, timeout=120) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(clients):
                group.create_task(self._client(client))
            group.create_task(self._swap())
            while time.perf_counter() < until:
                await asyncio.sleep(min(_PAUSE_S.value, max(0.0, until - time.perf_counter())))
                self.open.clear()
                while self.under_way:
                    await asyncio.sleep(0.02)
                check(self)
                self._over = time.perf_counter() >= until
                self.open.set()

    async def _client(self, client: openai.AsyncOpenAI) -> None:
        while not self._over:
            await self.open.wait()
            if self._over:
                return
            self.under_way += 1
            try:
                if self._random.random() < 0.15:
                    await self._hang_up(client)
                else:
                    await self._ask(client)
            except openai.NotFoundError:
                self.not_there += 1  # its adapter was unloaded in the meantime
            finally:
                self.under_way -= 1

    def _question(self) -> Question:
        adapter = self._random.choice([*self.loaded, "", ""])
        return Question(self._random.randrange(len(self._prompts)), self._random.randrange(len(WAYS)), adapter)

    def _body(self, question: Question) -> dict[str, Any]:
        way = dict(WAYS[question.way])
        beyond = {name: way.pop(name) for name in ("top_k", "min_p") if name in way}
        return {
            "model": question.adapter or self._server.config.model_name,
            "prompt": self._prompts[question.prompt],
            **way,
            "extra_body": {**beyond, "return_token_ids": True},
        }

    async def _ask(self, client: openai.AsyncOpenAI) -> None:
        question = self._question()
        completion = await client.completions.create(**self._body(question))
        answer = [list(getattr(choice, "token_ids", None) or ()) for choice in completion.choices]
        self.finished += 1
        if self.answers.setdefault(question, answer) != answer:
            self.conflicts.append(question)

    async def _hang_up(self, client: openai.AsyncOpenAI) -> None:
        stream = await client.completions.create(**self._body(self._question()), stream=True)
        patience = self._random.randrange(1, 20)
        async with stream, contextlib.aclosing(aiter(stream)) as pieces:  # type: ignore[type-var]
            async for _ in pieces:
                patience -= 1
                if not patience:
                    break
        self.hung_up += 1

    async def _swap(self) -> None:
        """Loads and unloads adapters, as many at once as the engine holds."""
        async with httpx.AsyncClient(base_url=self._server.base_url, timeout=120, trust_env=False) as client:
            while not self._over:
                await self.open.wait()
                if self._over:
                    return
                self.under_way += 1
                try:
                    if len(self.loaded) == _LOADED_AT_ONCE:
                        name = self.loaded.pop(self._random.randrange(len(self.loaded)))
                        answer = await client.post("/unload_lora_adapter", json={"lora_name": name})
                        answer.raise_for_status()
                    name = self._random.choice([name for name in self._adapters if name not in self.loaded])
                    body = {"lora_name": name, "lora_path": str(self._adapters[name])}
                    (await client.post("/load_lora_adapter", json=body)).raise_for_status()
                    self.loaded.append(name)
                    self.swaps += 1
                finally:
                    self.under_way -= 1
                await asyncio.sleep(self._random.uniform(0.5, 3.0))


def make_adapters(model: Path, workdir: Path, count: int) -> dict[str, Path]:
    """Random adapters of the model, as PEFT folders: different ranks, places and sizes."""
    folders = {}
    for number in range(count):
        decoder = load_decoder(model, progress=False)
        targets = (("all-linear",), ("q_proj", "v_proj"), ("down_proj",))[number % 3]
        config = LoraConfig(r=(2, 4, 8)[number % 3], alpha=8.0, targets=targets)
        attach(decoder, config, seed=number)
        rng = np.random.default_rng(number)
        factors = {
            name: dataclasses.replace(f, b=0.05 * rng.standard_normal(f.b.shape).astype(np.float32))
            for name, f in adapter_factors(decoder, config).items()
        }
        set_adapters(decoder, [factors])
        folders[f"adapter-{number}"] = workdir / f"adapter-{number}"
        save_peft(decoder, folders[f"adapter-{number}"], config, base_model=str(model))
    return folders


def make_prompts(model: Path, seed: int) -> list[list[int]]:
    """Problems that the model knows, and random tokens of many lengths, some with common beginnings."""
    tokenizer = load_tokenizer(model)
    rng = np.random.default_rng(seed)
    texts = [tokenizer.render_chat([{"role": "user", "content": p.content}]) for p in held_out(24, seed=seed)]
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    beginning = rng.integers(tokenizer.vocab_size, size=64).tolist()
    for length in (1, 2, 7, 15, 16, 17, 31, 33, 64, 90):
        prompts.append(rng.integers(tokenizer.vocab_size, size=length).tolist())
        prompts.append(beginning[: length // 2 + 1] + rng.integers(tokenizer.vocab_size, size=length).tolist())
    return prompts


def solo(
    model: Path, config: EngineConfig, adapters: Mapping[str, Path], prompts: list[list[int]], asked: list[Question]
) -> dict[Question, list[list[int]]]:
    """Each question alone, on a fresh engine with nothing clever switched on."""
    plain = dataclasses.replace(config, prefix_caching=False, overlap=False, speculation=0)
    answers: dict[Question, list[list[int]]] = {}
    with contextlib.closing(Engine.from_folder(model, plain)) as engine:
        engine.warm_up()
        bar = tqdm(total=len(asked), desc="asking again, one at a time", unit="answer", file=sys.stderr)
        for adapter in sorted({question.adapter for question in asked}):
            if adapter:
                engine.load_adapter(adapter, adapters[adapter])
            for question in (q for q in asked if q.adapter == adapter):
                (output,) = engine.generate(
                    [prompts[question.prompt]], SamplingParams(**WAYS[question.way]), adapter=adapter or None
                )
                answers[question] = [completion.token_ids for completion in output.completions]
                bar.update()
            if adapter:
                engine.unload_adapter(adapter)
        bar.close()
    return answers


def run() -> dict[str, Any]:
    for name in ("httpx", "httpx2", "jaxstack"):
        logging.getLogger(name).setLevel(logging.WARNING)
    workdir = Path(_WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    model = Path(_MODEL.value) if _MODEL.value else embedded_model()
    adapters = make_adapters(model, workdir, _ADAPTERS)
    prompts = make_prompts(model, _SEED.value)
    config = EngineConfig(
        max_sequences=16,
        max_batch_tokens=128,
        max_model_len=384,
        page_size=4,
        num_pages=320,  # little: cached prefixes are evicted and answers preempted all the time
        batch_invariant=True,
        speculation=3,
        max_adapters=_LOADED_AT_ONCE,
        max_adapter_rank=8,
    )
    watch = Watch()
    checks: list[dict[str, Any]] = []
    with contextlib.closing(Engine.from_folder(model, config)) as engine:
        engine.start()
        with BackgroundServer(engine, ServerConfig(port=0, model_name="base")) as server:
            traffic = Traffic(server, prompts, adapters, _SEED.value)
            began = time.perf_counter()
            bar = tqdm(total=round(_SECONDS.value), desc="load", unit="s", file=sys.stderr)

            def look() -> None:
                watch.look()
                bar.set_postfix_str(
                    f"{traffic.finished} answers, {traffic.hung_up} hung up, {traffic.swaps} adapters loaded, "
                    f"{watch.bytes[-1] / 2**20:.0f} MiB"
                )
                bar.n = min(bar.total, round(time.perf_counter() - began))
                bar.refresh()

            def check(traffic: Traffic) -> None:
                engine.scheduler.check_accounting()
                stats = engine.stats()
                checks.append(
                    {
                        "at_s": round(time.perf_counter() - began, 1),
                        "pages": [stats.pages_free, stats.pages_tree, stats.pages_private, stats.pages_total],
                        "recompilations": stats.recompilations,
                        "preemptions": stats.preemptions,
                    }
                )
                look()

            asyncio.run(_load(traffic, began, check, look))
            bar.close()
            stats = engine.stats()
    asked = sorted(traffic.answers, key=lambda q: (q.adapter, q.prompt, q.way))
    random.Random(_SEED.value).shuffle(asked)
    asked = asked[: _SOLO.value]
    alone = solo(model, config, adapters, prompts, asked)
    different = [question for question in asked if alone[question] != traffic.answers[question]]
    pages_right = all(sum(c["pages"][:3]) == c["pages"][3] and c["pages"][2] == 0 for c in checks)
    growth = watch.growth()
    summary = {
        "benchmark": "soak",
        "passed": not different
        and not traffic.conflicts
        and pages_right
        and stats.recompilations == 0
        and growth <= _FLAT,
        "seconds": round(time.perf_counter() - began, 1),
        "answers": traffic.finished,
        "hung_up": traffic.hung_up,
        "adapters_loaded": traffic.swaps,
        "adapter_gone": traffic.not_there,
        "preemptions": stats.preemptions,
        "checks_of_the_books": len(checks),
        "pages_accounted": pages_right,
        "recompilations": stats.recompilations,
        "memory_growth_share": round(growth, 4),
        "memory_mib": [round(watch.bytes[0] / 2**20), round(watch.bytes[-1] / 2**20)],
        "questions_asked_again_alone": len(asked),
        "answers_equal_alone": len(asked) - len(different),
        "answers_that_changed_meanwhile": len(traffic.conflicts),
        "different": [dataclasses.asdict(q) for q in (different + traffic.conflicts)[:20]],
        "jax": jax.__version__,
    }
    (workdir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(watch, checks, workdir / "soak.png")
    if not summary["passed"]:
        raise UserError(f"the soak test did not pass; see {workdir / 'summary.json'}")
    return summary


async def _load(traffic: Traffic, began: float, check: Callable[[Traffic], None], look: Callable[[], None]) -> None:
    async def keep_looking() -> None:
        while True:
            look()
            await asyncio.sleep(1.0)

    looking = asyncio.create_task(keep_looking())
    try:
        await traffic.run(_CLIENTS.value, began + _SECONDS.value, check)
    finally:
        looking.cancel()


def plot(watch: Watch, checks: list[dict[str, Any]], file: Path) -> None:
    """Resident size and pages over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
    above.plot(watch.seconds, [size / 2**20 for size in watch.bytes])
    most = max(watch.bytes) / 2**20
    above.set(ylabel="resident MiB", ylim=(0, 1.2 * most), title="memory of server, engine and clients")
    times = [c["at_s"] for c in checks]
    for i, name in enumerate(("free", "prefix cache", "private")):
        below.plot(times, [c["pages"][i] for c in checks], marker=".", label=name)
    below.set(xlabel="seconds", ylabel="pages", title="pages, whenever the load paused")
    below.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    job.main(run)
