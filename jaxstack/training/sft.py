"""Supervised fine-tuning from a config to a Hugging Face folder."""

import contextlib
import dataclasses
import functools
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxstack.models import Decoder, DecoderConfig, LoraParam
from jaxstack.models import lora as lora_layers
from jaxstack.models.checkpoint import load_decoder, save_decoder
from jaxstack.models.hf_config import config_from_folder
from jaxstack.models.peft_format import save_peft
from jaxstack.models.tokenizer import Tokenizer, load_tokenizer
from jaxstack.runtime.checkpoint import Checkpointer
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import MetricWriter, plot_curves, read_rows, write_summary
from jaxstack.runtime.signals import StopFlag, WorkdirLock
from jaxstack.training.config import SftConfig
from jaxstack.training.data import Example, TokenizedDataset, build_dataset, load_dataset
from jaxstack.training.flops import peak_flops, training_flops_per_token
from jaxstack.training.generation import GenerationEval, Generator, together
from jaxstack.training.initialize import fresh_decoder
from jaxstack.training.loop import LoopConfig, Trainer, perplexity, state_arrays, state_from_arrays
from jaxstack.training.losses import LossFn, cross_entropy
from jaxstack.training.optimizer import build_optimizer
from jaxstack.training.packing import PackedBatches, PackedLoader, Place
from jaxstack.training.same_job import (
    FREE_TO_CHANGE,
    comparable_config,
    differing_fields,
    folder_fingerprint,
    tokenizer_digest,
    workdir_has_checkpoints,
)
from jaxstack.training.sharding import Layout, host_device
from jaxstack.training.step import (
    ModelLoss,
    Params,
    SplitModel,
    decoder_loss,
    init_state,
    make_eval_step,
    make_train_step,
    parameter_count,
    split_model,
)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run left behind.

    Attributes:
      steps: steps done in all, over every start of the job.
      final_loss: mean loss in nats per target token of the last logged window; None before the first.
      tokens_trained: target tokens in all.
      model_folder: the Hugging Face folder; None if the run was stopped before its end.
      adapter_folder: the PEFT folder of a LoRA run.
      summary: what `summary.json` holds.
    """

    steps: int
    final_loss: float | None
    tokens_trained: int
    model_folder: Path | None
    adapter_folder: Path | None
    summary: dict[str, Any]


def train_sft(
    config: SftConfig,
    workdir: str | Path,
    *,
    examples: Sequence[Mapping[str, Any] | Example] | None = None,
    stop: threading.Event | None = None,
    loss_fn: LossFn = cross_entropy,
    generation: GenerationEval | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains, or goes on training, in `workdir`, and leaves a Hugging Face folder in `workdir/model`.

    A run that was killed at any moment and is started again with the same arguments ends with the same weights and the
    same `metrics.jsonl` (but for its timings) as one that was not; bit by bit on CPU. The first SIGTERM or SIGINT saves
    at the next step and returns; a second one ends the process.

    The workdir gets `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `loss.png`, `summary.json`, `model/`, and for LoRA
    also `adapter/` (`model/` then is the merged model).

    Args:
      config: the run.
      workdir: its folder; created when missing, locked while running.
      examples: rows in memory, instead of `config.data.paths`: mappings as in a JSONL file, or `Example`s.
      stop: another way to end the run early, for callers outside the main thread.
      loss_fn: of logits and targets.
      generation: what the model writes at every evaluation (`config.eval_every`), scored by a function of yours.
      progress: report on stderr.

    Raises:
      UserError: one line about the config, the data, the model, the workdir or its checkpoints; too many steps without
        a finite gradient; or the final checkpoint could not be written (the model is then saved nevertheless).
    """
    workdir = Path(workdir)
    with WorkdirLock(workdir), StopFlag(stop) as flag, contextlib.ExitStack() as stack:
        return _Run(config, workdir, examples, loss_fn, generation, flag, progress).train(stack)


class _Run:
    """One start of a job, in the order things happen."""

    def __init__(
        self,
        config: SftConfig,
        workdir: Path,
        examples: Sequence[Mapping[str, Any] | Example] | None,
        loss_fn: LossFn,
        generation: GenerationEval | None,
        stop: StopFlag,
        progress: bool,
    ):
        self.config, self.workdir, self.stop, self.progress = config, workdir, stop, progress
        self.generation = generation
        self.started = time.perf_counter()
        self.model_config = config.model if isinstance(config.model, DecoderConfig) else _config_of_folder(config.model)
        self.tokenizer_folder = config.tokenizer or (config.model if isinstance(config.model, str) else None)
        self.tokenizer = self._tokenizer()
        self._check_sizes()
        self.train_data = self._dataset(config.data.paths, examples)
        self.eval_data = self._dataset(config.data.eval_paths, None) if config.data.eval_paths else None
        self.say(f"data: {self.train_data.report.line()}")
        if self.eval_data is not None:
            self.say(f"held-out data: {self.eval_data.report.line()}")
        compute = {"auto": None if jax.default_backend() == "cpu" else jnp.bfloat16}.get(
            config.compute_dtype, config.compute_dtype
        )
        if compute is None:
            compute = jnp.float32
        longest = max(int(data.lengths.max()) for data in (self.train_data, self.eval_data) if data is not None)
        self.longest = min(config.seq_len, -(-longest // 16) * 16)
        self.compute_dtype, self.loss_fn = compute, loss_fn
        self.job = {
            "config": comparable_config(config),
            "data": self.train_data.digest(),
            "base": folder_fingerprint(config.model) if isinstance(config.model, str) else None,
        }

    def say(self, line: str) -> None:
        if self.progress:
            print(line, file=sys.stderr, flush=True)

    # ------------------------------------------------------------------------------------------------------- inputs

    def _tokenizer(self) -> Tokenizer | None:
        if self.tokenizer_folder is None:
            return None
        tokenizer = load_tokenizer(self.tokenizer_folder)
        fits = tokenizer.vocab_size <= self.model_config.vocab_size
        if not fits and self.config.tokenizer is None and not (Path(self.tokenizer_folder) / "tokenizer.json").exists():
            return None  # a model folder without a tokenizer: the byte fallback is not its vocabulary
        return tokenizer

    def _check_sizes(self) -> None:
        self.config.mesh.check_devices()
        window = self.model_config.max_position_embeddings
        if self.config.seq_len > window:
            raise UserError(
                f"seq_len={self.config.seq_len}: expected at most the model's max_position_embeddings={window}"
            )
        if self.tokenizer is not None and self.tokenizer.vocab_size > self.model_config.vocab_size:
            raise UserError(
                f"the tokenizer in {self.tokenizer_folder} has ids up to {self.tokenizer.vocab_size - 1}, expected "
                f"below the model's vocab_size={self.model_config.vocab_size}"
            )

    def _dataset(self, paths: Sequence[str], examples: Sequence[Any] | None) -> TokenizedDataset:
        config = self.config
        sizes = {"row_length": config.seq_len, "vocab_size": self.model_config.vocab_size}
        if examples is not None:
            rows = ((f"examples[{i}]", row) for i, row in enumerate(examples))
            return build_dataset(rows, self.tokenizer, config.data, **sizes)
        if not paths:
            raise UserError("data.paths is empty and no examples were given; expected at least one JSONL file")
        return load_dataset(
            paths,
            self.tokenizer,
            config.data,
            **sizes,
            cache_folder=self.workdir / "data_cache",
            cache_key=tokenizer_digest(self.tokenizer_folder, self.tokenizer),
        )

    def _model(self) -> Decoder:
        """The model with its adapters; for several devices in the host's memory, as it may be too large for one."""
        if self.config.mesh.devices == 1:
            return self._loaded_model()
        with jax.default_device(host_device()):
            return self._loaded_model()

    def _loaded_model(self) -> Decoder:
        config = self.config
        dtype = jnp.dtype(config.param_dtype)
        if isinstance(config.model, str):
            model = load_decoder(config.model, param_dtype=dtype, progress=self.progress)
        else:
            model = fresh_decoder(config.model, seed=config.seed, param_dtype=dtype)
        if config.lora is not None:
            matched = lora_layers.attach(model, config.lora, seed=config.seed)
            total = self.model_config.num_layers
            named = (name.removeprefix("layers.") for name in matched)
            counts = (
                f"{name} in {n} of {total}" if n < total and name != "lm_head" else name
                for name, n in zip(named, matched.values())
            )
            self.say(f"lora: {', '.join(counts)}")
        return model

    def _total_steps(self, batches: PackedBatches) -> int:
        config = self.config
        limits = [config.max_steps] if config.max_steps is not None else []
        if config.epochs is not None:
            whole, rest = int(config.epochs), config.epochs - int(config.epochs)
            # With max_steps given, later epochs need not be planned.
            steps = 0
            for epoch in range(whole):
                steps += batches.batches_in(epoch)
                if limits and steps >= limits[0]:
                    break
            limits.append(max(1, steps + (round(rest * batches.batches_in(whole)) if rest else 0)))
        return min(limits)

    # ------------------------------------------------------------------------------------------------------ training

    def train(self, stack: contextlib.ExitStack) -> TrainResult:
        config = self.config
        if not config.resume.enabled and workdir_has_checkpoints(self.workdir):
            raise UserError(f"{self.workdir} holds checkpoints and resume.enabled=false; choose another workdir")
        checkpointer = Checkpointer(self.workdir / "checkpoints", config.keep)
        stack.callback(checkpointer.close)
        self._check_same_job(checkpointer)
        _remove_leftovers(self.workdir)

        batches = PackedBatches(
            self.train_data,
            row_count=config.batch_rows * config.accum_steps,
            row_length=config.seq_len,
            seed=config.seed,
            packing=config.data.packing,
            window=config.data.window,
        )
        total_steps = self._total_steps(batches)
        split, params, frozen = split_model(self._model(), nnx.Param if config.lora is None else LoraParam)
        optimizer = build_optimizer(config.optimizer, params, total_steps=total_steps, adapters=config.lora is not None)
        layout = Layout(config.mesh, self.model_config, {**params, **frozen})
        if config.mesh.devices > 1:
            self.say(layout.describe())
        loss_of, coef = self._loss(batches, total_steps, layout), config.router_aux_loss_coef
        loss = loss_of(router_aux_loss_coef=coef)
        eval_step = make_eval_step(split, loss_of(router_aux_loss_coef=None if coef is None else 0.0))
        state = init_state(params, optimizer, layout)
        frozen = layout.put(frozen)
        trainable = parameter_count(params)
        self.say(
            f"model: {trainable} trainable of {trainable + parameter_count(frozen)} parameters; {total_steps} steps"
        )
        del params

        restored = checkpointer.restore_latest(state_arrays(state))
        place, loop_state = Place(), None
        if restored is not None:
            state = state_from_arrays(restored.arrays, state)
            place, loop_state = Place(**restored.metadata["data"]), restored.metadata["loop"]
            self.say(f"resumed at step {restored.step}")

        writer = stack.enter_context(MetricWriter(self.workdir, resume_step=restored.step if restored else 0))
        if not restored:
            writer.write_text("config", json.dumps(self.job["config"], indent=2))
        began = time.perf_counter()
        jitted = make_train_step(split, loss, optimizer, accum_steps=config.accum_steps, layout=layout)
        first = layout.put_batch(batches.batch(Place()))
        step = jitted.lower(state, frozen, first).compile()
        evaluate = self._evaluation(eval_step, state.params, frozen, layout)
        if self.generation is not None:
            generator = self._generator(self.generation, split, state.params, frozen, layout)
            stack.callback(generator.close)
            evaluate = together(*filter(None, (evaluate, generator)))
        compile_s = time.perf_counter() - began
        self.say(f"compiled in {compile_s:.1f} s")

        loader = PackedLoader(batches, place=place, transform=layout.put_batch)
        stack.callback(loader.close)
        trainer = Trainer(
            step,
            state,
            frozen,
            loader,
            epoch_of=lambda place: place.epoch + place.batch / batches.batches_in(place.epoch),
            config=LoopConfig(
                total_steps=total_steps,
                log_every=config.log_every,
                save_every=config.save_every,
                eval_every=config.eval_every,
                max_skipped_in_row=config.optimizer.max_skipped_in_row,
            ),
            checkpointer=checkpointer,
            writer=writer,
            stop=self.stop,
            evaluate=evaluate,
            metadata=self.job,
            resumed=loop_state,
            slots_per_step=config.batch_rows * config.accum_steps * config.seq_len,
            peak_tokens_per_s=self._peak_tokens_per_s(state.params),
            progress=self.progress,
        )
        del state
        trainer.run()
        loader.close()
        return self._finish(trainer, split, frozen, layout, batches, total_steps, compile_s)

    def _peak_tokens_per_s(self, trainable: Params) -> float | None:
        """Tokens that the devices could train in a second if they did nothing but the model's products."""
        peak = peak_flops(jax.devices()[0])
        # Half of the factors belong to slot 0, "no adapter".
        factors = None if self.config.lora is None else parameter_count(trainable) // 2
        work = training_flops_per_token(self.model_config, self.train_data.lengths, adapter_parameters=factors)
        return None if peak is None else self.config.mesh.devices * peak / work

    def _check_same_job(self, checkpointer: Checkpointer) -> None:
        saved = checkpointer.latest_metadata()
        if saved is None or self.config.resume.allow_changes:
            return
        before, now = saved["job"], json.loads(json.dumps(self.job))
        differing = differing_fields(before["config"], now["config"], ignore=FREE_TO_CHANGE)
        differing += [f"{what}: content differs" for what in ("data", "base") if before[what] != now[what]]
        if differing:
            raise UserError(
                f"{self.workdir} holds checkpoints of another configuration ({'; '.join(differing)}); expected the "
                "same, another workdir, or resume.allow_changes=true"
            )

    def _loss(self, batches: PackedBatches, total_steps: int, layout: Layout) -> Callable[..., ModelLoss]:
        """The loss, with room for the targets of the fullest batch of the run, held-out data included."""
        config = self.config
        most = batches.most_targets(total_steps, config.accum_steps)
        if self.eval_data is not None:
            held_out = self._eval_batches(self.eval_data)
            most = max(most, held_out.most_targets(held_out.batches_in(0)))
        return functools.partial(
            decoder_loss,
            self.loss_fn,
            remat=config.remat,
            unroll=config.unroll_layers,
            compute_dtype=self.compute_dtype,
            chunk_tokens=config.chunk_tokens,
            longest=self.longest,
            most_targets=-(-most // 64) * 64,
            layout=layout,
        )

    def _eval_batches(self, data: TokenizedDataset) -> PackedBatches:
        return PackedBatches(
            data,
            row_count=self.config.batch_rows,
            row_length=self.config.seq_len,
            packing=self.config.data.packing,
            window=self.config.data.window,
            shuffle=False,
        )

    def _evaluation(self, jitted: jax.stages.Wrapped, params: Params, frozen: Params, layout: Layout):
        """The function that evaluates on the held-out data, already compiled; None without such data."""
        if self.eval_data is None:
            return None
        batches = self._eval_batches(self.eval_data)
        step = jitted.lower(params, frozen, layout.put_batch(batches.batch(Place()))).compile()

        def evaluate(params: Any, stop: StopFlag) -> dict[str, float] | None:
            num = den = 0.0
            aux: dict[str, list[float]] = {}
            waiting = None
            for batch in (*batches.epoch_batches(), None):
                if stop:
                    return None
                running = None if batch is None else step(params, frozen, layout.put_batch(batch))
                if waiting is not None:
                    parts = jax.device_get(waiting)
                    num, den = num + float(parts.num), den + float(parts.den)
                    for name, (a, b) in parts.aux.items():
                        old = aux.setdefault(name, [0.0, 0.0])
                        old[0], old[1] = old[0] + float(a), old[1] + float(b)
                waiting = running
            means = {f"eval_{name}": a / max(b, 1.0) for name, (a, b) in aux.items()}
            loss = num / max(den, 1.0)
            return {"eval_loss": loss, "eval_perplexity": perplexity(loss), **means}

        return evaluate

    def _generator(
        self, wanted: GenerationEval, split: SplitModel, params: Params, frozen: Params, layout: Layout
    ) -> Generator:
        """What answers prompts with the current parameters, warm."""

        def decoder_of(params: Params) -> Decoder:
            device = jax.devices()[0]
            model = split.merge(layout.gathered(params, device), layout.gathered(frozen, device))
            return model if self.config.lora is None else lora_layers.merge(model)

        return Generator(wanted, self.tokenizer, self.model_config, decoder_of, params, progress=self.progress)

    # -------------------------------------------------------------------------------------------------------- export

    def _finish(
        self,
        trainer: Trainer,
        split: SplitModel,
        frozen: Any,
        layout: Layout,
        batches: PackedBatches,
        total_steps: int,
        compile_s: float,
    ) -> TrainResult:
        config, counts = self.config, trainer.counts
        finished = trainer.step_number >= total_steps
        model_folder = adapter_folder = None
        if finished:
            model = split.merge(layout.gathered(trainer.state.params), layout.gathered(frozen))
            if config.lora is not None:
                adapter_folder = self.workdir / "adapter"
                base = config.model if isinstance(config.model, str) else None
                save_peft(model, adapter_folder, config.lora, base_model=base)
                model = lora_layers.merge(model)
            model_folder = self.workdir / "model"
            dtype = None if config.export_dtype is None else jnp.dtype(config.export_dtype)
            save_decoder(model, model_folder, dtype=dtype, tokenizer_from=self.tokenizer_folder)
        steps_here = trainer.step_number - trainer.first_step
        summary = {
            "steps": trainer.step_number,
            "total_steps": total_steps,
            "stopped_by": None if finished else self.stop.reason,
            "final_loss": counts.last_loss,
            "eval_loss": counts.last_eval_loss,
            "scores": counts.last_scores,
            "tokens_trained": counts.tokens_trained,
            "tokens_seen": counts.tokens_seen,
            "skipped_steps": counts.skipped_steps,
            "steps_without_targets": counts.steps_without_targets,
            "fill_rate": round(batches.fill_rate(), 4),
            "data": self.train_data.report.as_json(),
            "eval_data": self.eval_data.report.as_json() if self.eval_data is not None else None,
            "trainable_parameters": parameter_count(trainer.state.params),
            "model_folder": str(model_folder) if model_folder else None,
            "adapter_folder": str(adapter_folder) if adapter_folder else None,
            "recompilations": trainer.recompilations,
            "compile_s": round(compile_s, 3),
            "step_time_s": round(trainer.train_s / max(1, steps_here - 1), 5) if steps_here > 1 else None,
            "tokens_per_s": round(trainer.trained_here / trainer.train_s, 1) if trainer.trained_here else None,
            "wall_s": round(time.perf_counter() - self.started, 3),
        }
        write_summary(self.workdir, summary)
        rows = read_rows(self.workdir / "metrics.jsonl")
        curves = {
            name: points
            for name, field in (("train", "loss"), ("eval", "eval_loss"))
            if (points := [(row["step"], row[field]) for row in rows if field in row])
        }
        plot_curves(self.workdir / "loss.png", curves, x="step", y="loss (nats per target token)")
        if trainer.save_failed:
            raise UserError(
                f"the final checkpoint in {self.workdir}/checkpoints could not be written"
                + (f"; the model was saved to {model_folder}" if model_folder else "")
            )
        return TrainResult(
            trainer.step_number, counts.last_loss, counts.tokens_trained, model_folder, adapter_folder, summary
        )


def _config_of_folder(folder: str) -> DecoderConfig:
    if not Path(folder).is_dir():
        raise UserError(f"model: no such folder {folder!r}; expected a Hugging Face folder")
    return config_from_folder(Path(folder))


def _remove_leftovers(workdir: Path) -> None:
    """Removes temporary folders of exports that were killed; this process holds the lock."""
    for name in ("model", "adapter"):
        for path in workdir.glob(f".{name}.*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
