"""Our side of the serving benchmark: the model, the engine, and the two ways to reach it."""

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import openai
import tokenizers
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.engine.batch import HostBatch
from jaxstack.engine.request import RequestTiming
from jaxstack.engine.runner import Launched
from jaxstack.models.checkpoint import load_decoder, save_decoder
from jaxstack.models.decoder import Decoder, DecoderConfig
from jaxstack.models.hf_config import config_from_folder
from jaxstack.models.tokenizer import Tokenizer
from jaxstack.serving import BackgroundServer
from launch.serve_benchmark.workload import Requests, Workload


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run of one side.

    Attributes:
      wall_s: seconds from the first request to the last answer.
      cpu_s: CPU seconds of the side's process meanwhile, all threads.
      tokens: of every request.
      timings: when our engine received each request and drew its tokens.
      steps: `(rows, sampled)` of every step of our engine: token rows computed for a request (no padding), and how many
        of them went through the output matrix for a token.
    """

    wall_s: float
    cpu_s: float
    tokens: list[list[int]]
    timings: tuple[RequestTiming, ...] = ()
    steps: tuple[tuple[int, int], ...] = ()


def model_folder(workdir: Path, config: DecoderConfig, seed: int) -> Path:
    """A Hugging Face folder of random float32 weights (normal, standard deviation 0.02), made once for both sides."""
    folder = workdir / f"model-layers{config.num_layers}-vocab{config.vocab_size}-seed{seed}"
    # A folder takes its name only when it is complete.
    if not (folder.is_dir() and config_from_folder(folder) == config):
        save_decoder(Decoder(config, rngs=nnx.Rngs(seed)), folder)
    return folder


def number_tokenizer(vocab_size: int) -> Tokenizer:
    """Token i is the number i between spaces, so that the server has the work of detokenising, as it always does."""
    pipeline = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return Tokenizer(pipeline)


class Ours:
    """The engine on its own thread, which waits on a condition between runs and uses no processor.

    Attributes:
      warm_up_s: compilation and the first run of every step.
    """

    def __init__(self, folder: Path, workload: Workload, config: EngineConfig):
        self.engine = Engine(load_decoder(folder, progress=False), number_tokenizer(workload.vocab_size), config)
        self._timings: list[RequestTiming] = []
        self._steps: list[tuple[int, int]] = []
        self.engine.on_finish(self._timings.append)
        self._record_steps()
        began = time.perf_counter()
        self.engine.start(progress=True)
        self.warm_up_s = time.perf_counter() - began
        self._server = BackgroundServer(self.engine)
        self._server.__enter__()

    def in_process(self, requests: Requests) -> Measured:
        """`Engine.generate`."""
        sampling = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in requests.max_tokens]
        finish = self._start_clock()
        outputs = self.engine.generate(requests.prompts, sampling)
        return finish([output.completions[0].token_ids for output in outputs])

    def over_http(self, requests: Requests) -> Measured:
        """The same through our server: an openai client that is there already, all requests at once, whole answers."""
        return asyncio.run(self._post_all(requests))

    async def _post_all(self, requests: Requests) -> Measured:
        async with openai.AsyncOpenAI(
            base_url=self._server.base_url, api_key="none", max_retries=0, timeout=None
        ) as client:

            async def answer(prompt: list[int], max_tokens: int) -> list[int]:
                completion = await client.completions.create(
                    model=self._server.config.model_name,
                    prompt=prompt,
                    max_tokens=max_tokens,
                    temperature=0.0,
                    extra_body={"ignore_eos": True, "return_token_ids": True},
                )
                # A field beside OpenAI's, as vLLM has it.
                return list(getattr(completion.choices[0], "token_ids", None) or ())

            finish = self._start_clock()
            return finish(await asyncio.gather(*map(answer, requests.prompts, requests.max_tokens)))

    def close(self) -> None:
        self._server.__exit__(None, None, None)
        self.engine.close()

    def _start_clock(self) -> Callable[[list[list[int]]], Measured]:
        """Begins a measurement; what is returned ends it, given the answers."""
        self._timings.clear()
        self._steps.clear()
        began_wall, began_cpu = time.perf_counter(), time.process_time()

        def finish(tokens: list[list[int]]) -> Measured:
            wall, cpu = time.perf_counter() - began_wall, time.process_time() - began_cpu
            return Measured(wall, cpu, tokens, tuple(self._timings), tuple(self._steps))

        return finish

    def _record_steps(self) -> None:
        runner = self.engine.runner
        launch = runner.launch

        def recorded(batch: HostBatch) -> Launched:
            self._steps.append((batch.plan.tokens, sum(row.samples for row in batch.plan.rows)))
            return launch(batch)

        runner.launch = recorded  # type: ignore[method-assign]
