"""Hugging Face transformers on the CPU, answering JSON lines: the peer's side of `launch.bench_serve`.

Runs by its path in the peers' environment and imports nothing of this project but its neighbour `answering.py`, which
says how it is asked.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from answering import answer_requests
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

_GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"  # read by transformers at every call

_ORDERS: dict[str, Callable[[int, int], int]] = {
    "given": lambda prompt, output: 0,
    "output": lambda prompt, output: -output,
    "prompt": lambda prompt, output: -prompt,
    "total": lambda prompt, output: -prompt - output,
}


def _in_order(order: str, prompts: list[list[int]], max_tokens: list[int]) -> list[int]:
    """Indices of the requests, longest first by the measure `order` names."""
    return sorted(range(len(prompts)), key=lambda i: _ORDERS[order](len(prompts[i]), max_tokens[i]))


class Peer:
    """One model and the two ways transformers has of answering many requests. Times are seconds, measured here."""

    def load(self, folder: str, threads: int, dtype: str = "float32") -> dict:
        """Opens the folder in `dtype` with `sdpa` attention."""
        torch.set_num_threads(threads)
        began = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model.eval().requires_grad_(False)
        self.manager: Any = None
        self.settings: dict | None = None
        return {
            "seconds": time.perf_counter() - began,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        }

    def choose_threads(self, candidates: list[int], prompt: int = 256, decodes: int = 32, repeats: int = 3) -> dict:
        """Seconds of one prompt and one batch of single tokens by number of threads; keeps the fastest number."""
        vocabulary = self.model.config.vocab_size
        inputs = [torch.arange(n).reshape(s) % vocabulary for n, s in ((prompt, (1, prompt)), (decodes, (decodes, 1)))]
        seconds = {}
        with torch.inference_mode():
            for threads in candidates:
                torch.set_num_threads(threads)
                best = [float("inf")] * len(inputs)
                for _ in range(repeats):
                    for i, ids in enumerate(inputs):
                        began = time.perf_counter()
                        self.model(input_ids=ids, use_cache=False)
                        best[i] = min(best[i], time.perf_counter() - began)
                seconds[threads] = sum(best)
        chosen = min(seconds, key=seconds.__getitem__)
        torch.set_num_threads(chosen)
        return {"threads": chosen, "seconds": {str(n): s for n, s in seconds.items()}}

    def generate(
        self, prompts: list[list[int]], max_tokens: list[int], batch: int, order: str, grouped: bool = False
    ) -> dict:
        """`generate` on left-padded batches of `batch` requests; each batch runs to its longest answer.

        `grouped` lets `sdpa` share keys and values among the query heads of a group instead of copying them.
        """
        os.environ[_GROUPED] = str(int(grouped))
        answers: list[list[int]] = [[]] * len(prompts)
        wall, cpu = time.perf_counter(), time.process_time()
        chosen = _in_order(order, prompts, max_tokens)
        with torch.inference_mode():
            for start in range(0, len(chosen), batch):
                rows = chosen[start : start + batch]
                width = max(len(prompts[i]) for i in rows)
                ids = torch.zeros((len(rows), width), dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(rows):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                out = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=GenerationConfig(
                        max_new_tokens=max(max_tokens[i] for i in rows),
                        do_sample=False,
                        eos_token_id=None,
                        pad_token_id=0,
                    ),
                )
                for row, i in enumerate(rows):
                    answers[i] = out[row, width : width + max_tokens[i]].tolist()
        return {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "tokens": answers}

    def generate_batch(self, prompts: list[list[int]], max_tokens: list[int], order: str, **settings) -> dict:
        """Continuous batching: the manager behind `generate_batch`, which takes an answer length for each request.

        `settings`: `attention` ("sdpa" or "eager"), `grouped` (see `generate`), and fields of
        `ContinuousBatchingConfig`. The manager stays for the next call with the same settings. The clock runs from the
        first request handed in to the last answer; the start and the end of the manager's thread are outside.
        """
        os.environ[_GROUPED] = str(int(settings.get("grouped", False)))
        manager = self._open(settings)
        manager.start()
        try:
            while manager.batch_processor is None and manager.is_running():
                time.sleep(0.01)
            wall, cpu = time.perf_counter(), time.process_time()
            # Equal beginnings side by side, so that one of them is computed first and the others share it.
            together = settings.get("allow_block_sharing", False)
            chosen = (
                sorted(range(len(prompts)), key=prompts.__getitem__)
                if together
                else _in_order(order, prompts, max_tokens)
            )
            names = {manager.add_request(prompts[i], max_new_tokens=max_tokens[i], eos_token_id=-1): i for i in chosen}
            answers: list[list[int]] = [[]] * len(prompts)
            left = len(names)
            while left:
                result = manager.get_result(timeout=1)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError(
                            f"the generation thread ended: {manager.background_thread_status.fatal_error}"
                        )
                elif result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    answers[names[result.request_id]] = list(result.generated_tokens)
                    left -= 1
            measured = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "tokens": answers}
        except BaseException:
            manager.stop(block=True, hard_stop=True)
            self._close()
            raise
        manager.stop(block=True, keep_for_next_session=True)
        return measured

    def _open(self, settings: dict):
        if settings != self.settings:
            self._close()
            fields = dict(settings)
            fields.pop("grouped", None)
            self.model.set_attn_implementation(fields.pop("attention"))
            self.manager = self.model.init_continuous_batching(
                GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
                continuous_batching_config=ContinuousBatchingConfig(auto_switch_to_flash=False, **fields),
            )
            self.manager.warmup()
            self.settings = settings
        else:
            self.manager = self.model.init_continuous_batching()
        return self.manager

    def _close(self) -> None:
        self.model.destroy_cached_continuous_batching_manager()
        self.model.set_attn_implementation("sdpa")
        self.manager = self.settings = None


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    answer_requests(Peer())
