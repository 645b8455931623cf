"""One cell of the study: train on perturbed demonstrations, answer held-out problems, write down what came of it.

A cell is a folder: `train/` is the trainer's (checkpoints, metrics, model), `answers.jsonl` has every graded answer,
and `summary.json`, written last, says that the cell is done. The base stage is a cell, too, whose model all others
start from.
"""

import dataclasses
import json
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models.checkpoint import load_decoder
from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning.longcot.config import BASE, Cell, StudyConfig
from jaxstack.reasoning.longcot.results import read_summary
from jaxstack.reasoning.longcot.tasks import Document, prompt_of, task_named
from jaxstack.reasoning.tokenizer import write_tokenizer
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_atomically, write_summary
from jaxstack.runtime.signals import WorkdirLock
from jaxstack.training import DataConfig, LoraConfig, OptimizerConfig, SftConfig, train_sft

_MODES = ("greedy", "t1", "no_thinking", "slipped")
_LOCK_TRIES, _LOCK_PAUSE_S = 50, 0.2
LORA = LoraConfig(r=16, alpha=32.0)
"""The adapters of cells with them."""


class CellRunner:
    """Runs cells, one after the other, with one engine that is handed the models in turn.

    Args:
      config: of the study.
      workdir: of the study; each cell gets a folder in it.
    """

    def __init__(self, config: StudyConfig, workdir: Path):
        self.task, self.config, self.workdir = task_named(config.task), config, workdir
        self._engine: Engine | None = None
        self._ids = {word: number for number, word in enumerate(self.task.vocabulary)}

    def run(self, cell: Cell, *, stop: threading.Event | None = None) -> dict[str, Any] | None:
        """The cell's summary; at once if it is done, None if it was stopped. A killed cell goes on where it was."""
        folder = self.workdir / cell.folder
        if (done := read_summary(folder)) is not None:
            return done
        began = time.perf_counter()
        config, documents = self._training(cell)
        examples = [document.example(self._ids) for document in documents]
        data_s = time.perf_counter() - began
        _wait_for_lock(folder / "train")
        result = train_sft(config, folder / "train", examples=examples, stop=stop, progress=False)
        if result.model_folder is None:
            return None
        train_s = time.perf_counter() - began - data_s
        answers = self._answers(result.model_folder, cell.seed)
        write_atomically(folder / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in answers))
        training = ("steps", "final_loss", "tokens_trained", "fill_rate", "step_time_s", "compile_s", "recompilations")
        summary: dict[str, Any] = {
            **dataclasses.asdict(cell),
            **self._figures(answers),
            "train": {name: result.summary[name] for name in training},
            "documents": len(examples),
            "backend": jax.default_backend(),
            "data_s": round(data_s, 2),
            "train_s": round(train_s, 2),
            "evaluate_s": round(time.perf_counter() - began - data_s - train_s, 2),
        }
        write_summary(folder, summary)
        return summary

    def _training(self, cell: Cell) -> tuple[SftConfig, Iterable[Document]]:
        study, base = self.config, cell.kind == "base"
        if base:
            steps, rate = study.base_steps, study.base_learning_rate
            documents = self.task.base_documents(study.base_documents, study.base_seed)
        else:
            steps, rate = study.sft_steps, study.sft_learning_rate
            documents = self.task.demonstrations(
                cell.kind, cell.fraction, cell.documents or study.sft_documents, cell.seed
            )
        decoder = self.task.model(study.width, study.layers)
        tokenizer = self.workdir / "tokenizer"
        if base:
            tokenizer.mkdir(parents=True, exist_ok=True)
            write_tokenizer(tokenizer, max_length=decoder.max_position_embeddings, vocabulary=self.task.vocabulary)
        config = SftConfig(
            model=decoder if base else str(self.workdir / BASE.folder / "train" / "model"),
            tokenizer=str(tokenizer),
            data=DataConfig(overflow="error"),  # rows are made to hold the longest text
            lora=LORA if cell.lora else None,
            optimizer=OptimizerConfig(
                learning_rate=rate,
                b2=0.98,
                weight_decay=0.01,
                warmup_steps=min(20, steps // 2),
                schedule="cosine",
                end_lr_ratio=0.05,
            ),
            batch_rows=study.batch_rows,
            seq_len=self.task.seq_len,
            max_steps=steps,
            log_every=min(10, steps),
            save_every=study.save_every,
            seed=study.base_seed if base else cell.seed,
        )
        return config, documents

    def _answers(self, model_folder: Path, seed: int) -> list[dict[str, Any]]:
        """Every problem's answers, graded: greedy, one sample at temperature 1, and, where the task knows them, greedy
        without thinking, and greedy behind a thought that has just slipped.

        The sample's seed is keyed by (seed, problem), so that it does not depend on the cell.
        """
        task, problems = self.task, self.task.problems(self.config.problems)
        engine = self._engine_of(model_folder)
        limit = task.max_tokens
        prompts, sampling = [], []
        knows = {"no_thinking": task.no_thinking, "slipped": task.slip(problems[0]) is not None}
        modes = [mode for mode in _MODES if knows.get(mode, True)]
        for mode in modes:
            for problem in problems:
                prompt = prompt_of(problem.content, thinking=mode != "no_thinking")
                prompts.append(self._token_ids(f"{prompt} {task.slip(problem)}" if mode == "slipped" else prompt))
                key = zlib.crc32(f"{seed} {problem.identity}".encode())
                sampling.append(
                    SamplingParams(temperature=1.0, seed=key, max_tokens=limit)
                    if mode == "t1"
                    else SamplingParams(temperature=0.0, max_tokens=limit)
                )
        outputs = engine.generate(prompts, sampling)
        rows: list[dict[str, Any]] = [
            {"problem": problem.content, "cluster": str(problem.identity)} for problem in problems
        ]
        for number, output in enumerate(outputs):
            mode, place = modes[number // len(problems)], number % len(problems)
            completion = output.completions[0]
            correct, reason = task.correct(problems[place], completion.text)
            rows[place][mode] = {
                "correct": correct,
                "reason": reason,
                "tokens": len(completion.token_ids),
                "text": completion.text,
            }
        return rows

    def _token_ids(self, text: str) -> list[int]:
        return [self._ids[word] for word in text.split(" ")]

    def _engine_of(self, folder: Path) -> Engine:
        if self._engine is None:
            rows = min(64, self.config.problems)
            # No cached prefixes: every problem is asked for twice, and the second answer would hang on the first.
            config = EngineConfig(max_sequences=rows, max_batch_tokens=2 * rows, prefix_caching=False)
            decoder = load_decoder(folder)
            self._engine = Engine(decoder, load_tokenizer(self.workdir / "tokenizer"), config)
        else:
            self._engine.update_weights(load_decoder(folder))
        return self._engine

    def _figures(self, answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
        problems = self.task.problems(self.config.problems)
        texts = [row["greedy"]["text"] for row in answers]
        modes = [mode for mode in _MODES if mode in answers[0]]
        shares = {mode: sum(row[mode]["correct"] for row in answers) / len(answers) for mode in modes}
        return {
            **shares,
            "mean_tokens": sum(row["greedy"]["tokens"] for row in answers) / len(answers),
            "no_answer": sum(row["greedy"]["reason"] == "no answer" for row in answers) / len(answers),
            **self.task.diagnostics(problems, texts),
        }


def _wait_for_lock(folder: Path) -> None:
    """Waits for the worker of a killed study, which ends as soon as it notices, to let go of its folder."""
    for _ in range(_LOCK_TRIES):
        try:
            with WorkdirLock(folder):
                return
        except UserError:
            time.sleep(_LOCK_PAUSE_S)
    # Whoever it is, it is alive; the trainer says who.
