"""Supervised fine-tuning: a model and examples in, a Hugging Face folder out.

    python -m launch.sft --config=configs/sft_countdown.py --workdir=work/countdown
    python -m launch.sft --config=my_config.py --config.max_steps=200 --workdir=work/mine
    python -m launch.sft --config=my_config.py --config.mesh.fsdp=8 --workdir=work/on_eight_devices

The workdir gets model/ (and adapter/ for LoRA), checkpoints/, metrics.jsonl, tensorboard/, loss.png and summary.json.
Started again in the same workdir it goes on where it was, whatever ended it; Ctrl-C and SIGTERM save first.
"""

if __name__ == "__main__":  # before anything else is imported
    from jaxstack.runtime.memory import restart_with_huge_pages

    restart_with_huge_pages()

import dataclasses
from pathlib import Path
from typing import Any

from absl import flags, logging

from jaxstack.models.tokenizer import load_tokenizer
from jaxstack.reasoning.countdown import held_out
from jaxstack.reasoning.datasets import write_dataset
from jaxstack.reasoning.evaluation import evaluation_in_training
from jaxstack.runtime.compilation import use_compilation_cache
from jaxstack.runtime.errors import UserError
from jaxstack.training import GenerationEval, SftConfig, train_sft
from launch import job

_CONFIG = job.config_flag(SftConfig, "configs/sft_countdown.py")
_WORKDIR = flags.DEFINE_string("workdir", "work/sft", "where everything goes; a run found there is continued")
_SEED = flags.DEFINE_integer("seed", None, "of fresh weights and the order of the data; the config's by default")
_COUNTDOWN = flags.DEFINE_integer(
    "countdown", 0, "held-out Countdown problems that the model answers at every evaluation (--config.eval_every)"
)
_COMPILED = flags.DEFINE_string("compilation_cache", None, "folder that keeps compiled programs: quick restarts")


def with_data(config: SftConfig, workdir: Path) -> SftConfig:
    """The config with its named data set written into the workdir, where it has no paths of its own."""
    name, size = config.data.dataset, config.data.dataset_size
    if name is None or config.data.paths:
        return config
    path = workdir / f"{name}_{size}_{config.seed}.jsonl"
    if not path.exists():
        write_dataset(name, path, size=size, seed=config.seed)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, paths=(str(path),)))


def problems_to_answer(config: SftConfig, count: int) -> GenerationEval | None:
    """What the model is asked while it is trained; None for nothing.

    Raises:
      UserError: the model has no tokenizer, or one without a chat template.
    """
    if not count:
        return None
    folder = config.tokenizer or config.model
    if not isinstance(folder, str):
        raise UserError(f"--countdown={count}: found no tokenizer, expected config.tokenizer or a model's folder")
    # Not the problems that final figures are made of.
    return evaluation_in_training(held_out(count, seed=0), load_tokenizer(folder), thinking=True)


def run() -> dict[str, Any]:
    logging.set_verbosity(logging.WARNING)
    config, workdir = _CONFIG.get(), Path(_WORKDIR.value)
    if _SEED.value is not None:
        config = dataclasses.replace(config, seed=_SEED.value)
    if _COMPILED.value:
        use_compilation_cache(_COMPILED.value)
    generation = problems_to_answer(config, _COUNTDOWN.value)
    return train_sft(with_data(config, workdir), workdir, generation=generation).summary


if __name__ == "__main__":
    job.main(run)
