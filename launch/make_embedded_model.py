"""Trains the embedded Countdown model from scratch: base stage, SFT stage, measurement, export. Minutes on two cores.

Every stage resumes: killed at any moment and started again in the same workdir, it goes on where it was.

    python -m launch.make_embedded_model --workdir=work/embedded
    python -m launch.make_embedded_model --workdir=work/embedded --install     # and put it where the package finds it
"""

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

from absl import flags

import jaxstack.models.embedded
from configs import countdown_base, sft_countdown
from jaxstack.reasoning.datasets import write_dataset
from jaxstack.reasoning.tokenizer import write_tokenizer
from jaxstack.training import SftConfig, TrainResult, train_sft
from launch import job
from launch.model_record import SHIPPED, figures, measure, model_card, training_record

_WORKDIR = flags.DEFINE_string("workdir", "work/embedded", "where everything goes; the model is its folder model/")
_SEED = flags.DEFINE_integer("seed", 0, "of weights, data and their order")
_BASE_STEPS = flags.DEFINE_integer("base_steps", None, "steps of the base stage instead of the config's", lower_bound=1)
_SFT_STEPS = flags.DEFINE_integer("sft_steps", None, "steps of the SFT stage instead of the config's", lower_bound=1)
_EVALUATE = flags.DEFINE_integer("evaluate", 512, "held-out problems to measure on", lower_bound=1)
_INSTALL = flags.DEFINE_bool("install", False, "replace the embedded model of this checkout by the result")


def train_stage(config: SftConfig, workdir: Path, name: str, *, data_seed: int) -> TrainResult:
    """One stage in `workdir/name` on its data set in `workdir/data`; `model_folder` is None if it was stopped."""
    assert config.data.dataset is not None
    file = workdir / "data" / f"{config.data.dataset}_{config.data.dataset_size}_{data_seed}.jsonl"
    if not file.exists():
        write_dataset(config.data.dataset, file, size=config.data.dataset_size, seed=data_seed)
    data = dataclasses.replace(config.data, paths=(str(file),))
    return train_sft(dataclasses.replace(config, data=data), workdir / name)


def run() -> dict[str, Any] | None:
    began = time.perf_counter()
    workdir = Path(_WORKDIR.value)
    tokenizer = workdir / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    window = countdown_base.MODEL.max_position_embeddings
    write_tokenizer(tokenizer, max_length=window)

    base_config = countdown_base.get_config(tokenizer=str(tokenizer))
    base_config = dataclasses.replace(
        base_config, seed=_SEED.value, max_steps=_BASE_STEPS.value or base_config.max_steps
    )
    base = train_stage(base_config, workdir, "base", data_seed=_SEED.value)
    if base.model_folder is None:
        return {"stopped_in": "base", **base.summary}
    sft_config = sft_countdown.get_config(model=str(base.model_folder), tokenizer=str(tokenizer))
    sft_config = dataclasses.replace(
        sft_config, seed=_SEED.value + 1, max_steps=_SFT_STEPS.value or sft_config.max_steps
    )
    sft = train_stage(sft_config, workdir, "sft", data_seed=_SEED.value + 1)
    if sft.model_folder is None:
        return {"stopped_in": "sft", **sft.summary}

    folder = workdir / "model"
    folder.mkdir(exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(sft.model_folder / name, folder / name)
    generation = json.loads((folder / "generation_config.json").read_text()) | {"do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    measured = figures(*measure(folder, _EVALUATE.value))
    record = training_record(
        folder, workdir, _SEED.value, {"base": (base_config, base), "sft": (sft_config, sft)}, measured
    )
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "MODEL.md").write_text(model_card(record))
    if _INSTALL.value:
        home = Path(jaxstack.models.embedded.__file__).parent / "countdown"
        home.mkdir(exist_ok=True)
        for name in (*SHIPPED, "training.json", "MODEL.md"):
            shutil.copyfile(folder / name, home / name)
    return {
        "accuracy": measured["accuracy"],
        "accuracy_no_thinking": measured["accuracy_no_thinking"],
        "problems": measured["problems"],
        "model": str(folder),
        "size_bytes": sum((folder / name).stat().st_size for name in SHIPPED),
        "installed": _INSTALL.value,
        "wall_s": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    job.main(run)
