"""Trains the embedded Countdown model from scratch: base stage, SFT stage, measurement, export. Minutes on two cores.

Every stage resumes: killed at any moment and started again in the same workdir, it goes on where it was.

    python -m launch.make_embedded_model --workdir=work/embedded
    python -m launch.make_embedded_model --workdir=work/embedded --install     # and put it where the package finds it
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

import jaxstack.models.embedded
from configs import countdown_base, sft_countdown
from jaxstack.engine import Engine, EngineConfig
from jaxstack.reasoning.countdown import held_out, solve
from jaxstack.reasoning.datasets import write_dataset
from jaxstack.reasoning.evaluation import Outcome, accuracy, answer_problems
from jaxstack.reasoning.tokenizer import write_tokenizer
from jaxstack.runtime.metrics import read_rows
from jaxstack.serving import EngineModel
from jaxstack.training import SftConfig, TrainResult, train_sft
from launch import job

_WORKDIR = flags.DEFINE_string("workdir", "work/embedded", "where everything goes; the model is its folder model/")
_SEED = flags.DEFINE_integer("seed", 0, "of weights, data and their order")
_BASE_STEPS = flags.DEFINE_integer("base_steps", None, "steps of the base stage instead of the config's", lower_bound=1)
_SFT_STEPS = flags.DEFINE_integer("sft_steps", None, "steps of the SFT stage instead of the config's", lower_bound=1)
_EVALUATE = flags.DEFINE_integer("evaluate", 512, "held-out problems to measure on", lower_bound=1)
_INSTALL = flags.DEFINE_bool("install", False, "replace the embedded model of this checkout by the result")

# Shuffle of the held-out prompts for final figures; development used prompts of other problems.
_FINAL_SHUFFLE = 5
_SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def train_stage(config: SftConfig, workdir: Path, name: str, *, data_seed: int) -> TrainResult:
    """One stage in `workdir/name` on its data set in `workdir/data`; `model_folder` is None if it was stopped."""
    assert config.data.dataset is not None
    file = workdir / "data" / f"{config.data.dataset}_{config.data.dataset_size}_{data_seed}.jsonl"
    if not file.exists():
        write_dataset(config.data.dataset, file, size=config.data.dataset_size, seed=data_seed)
    data = dataclasses.replace(config.data, paths=(str(file),))
    return train_sft(dataclasses.replace(config, data=data), workdir / name)


def measure(folder: Path, count: int) -> tuple[list[Outcome], list[Outcome]]:
    """Greedy answers to `count` held-out prompts, with and without thinking."""
    model = EngineModel(Engine.from_folder(folder, EngineConfig(max_sequences=32, max_batch_tokens=256)))
    problems = held_out(count, seed=_FINAL_SHUFFLE)
    return answer_problems(model, problems, thinking=True), answer_problems(model, problems, thinking=False)


def figures(thinking: Sequence[Outcome], direct: Sequence[Outcome]) -> dict[str, Any]:
    """The measured accuracy as training.json and MODEL.md state it."""
    depths = sorted({_depth(outcome) for outcome in thinking})
    example = next((o for o in thinking if o.correct and _depth(o) == 1), thinking[0])
    return {
        "problems": len(thinking),
        "shuffle_seed": _FINAL_SHUFFLE,
        "sampling": "greedy, 150 new tokens at most",
        "accuracy": accuracy(thinking),
        "accuracy_no_thinking": accuracy(direct),
        "accuracy_by_first_hit": {
            str(d): accuracy([outcome for outcome in thinking if _depth(outcome) == d]) for d in depths
        },
        "accuracy_no_thinking_by_first_hit": {
            str(d): accuracy([outcome for outcome in direct if _depth(outcome) == d]) for d in depths
        },
        "example": {"prompt": example.problem.content, "answer": example.text},
        "mean_tokens": round(sum(outcome.tokens for outcome in thinking) / len(thinking), 1),
    }


def training_seconds(stage: Path) -> float:
    """Time in training steps, over every start of the stage; without loading, compiling and saving."""
    seconds, done = 0.0, 0
    for row in read_rows(stage / "metrics.jsonl"):
        seconds += row["step_time_s"] * (row["step"] - done)
        done = row["step"]
    return seconds


def _depth(outcome: Outcome) -> int:
    solution = solve(outcome.problem)
    return -1 if solution is None else solution.depth


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def training_record(
    folder: Path, workdir: Path, stages: dict[str, tuple[SftConfig, TrainResult]], measured: dict[str, Any]
) -> dict[str, Any]:
    """What training.json holds: how the files in `folder` came to be, and their digests."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
    return {
        "made_by": "python -m launch.make_embedded_model",
        "seed": _SEED.value,
        "stages": {
            name: {
                "steps": result.steps,
                "tokens_trained": result.tokens_trained,
                "final_loss": result.final_loss,
                "train_s": round(training_seconds(workdir / name), 1),
                "batch_rows": config.batch_rows,
                "seq_len": config.seq_len,
                "seed": config.seed,
                "optimizer": dataclasses.asdict(config.optimizer),
                "data": {
                    "name": config.data.dataset,
                    "size": config.data.dataset_size,
                    "sha256": _sha256(next((workdir / "data").glob(f"{config.data.dataset}_*.jsonl"))),
                    **result.summary["data"],
                },
            }
            for name, (config, result) in stages.items()
        },
        "measured": measured,
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "sha256": {name: _sha256(folder / name) for name in _SHIPPED},
    }


def model_card(record: dict[str, Any]) -> str:
    """MODEL.md."""
    measured, stages = record["measured"], record["stages"]
    example = measured["example"]
    shown = "\n".join(f"    {line.strip()}" if line.strip() else "" for line in example["answer"].split("\n"))
    by_depth = "\n".join(
        f"| {depth} | {share:.3f} | {measured['accuracy_no_thinking_by_first_hit'][depth]:.3f} |"
        for depth, share in measured["accuracy_by_first_hit"].items()
    )
    rows = "\n".join(
        f"| {name} | {s['data']['name']}, {s['data']['size']} texts, seed {s['seed']} | {s['steps']} "
        f"| {s['optimizer']['learning_rate']} | {s['tokens_trained']} | {s['train_s']:.0f} s |"
        for name, s in stages.items()
    )
    return f"""# Countdown-3 reasoner

A language model of 168,576 parameters that solves Countdown problems by searching aloud: three numbers from 1 to 12, a
target from 10 to 99, each number used once with + - *. It exists so that everything in this repository that needs a
reasoning model (the server's demo, tests, studies) has one that is trained here, in minutes, and fits into the package.

Architecture: Llama (`LlamaForCausalLM`), hidden 64, 3 layers, 4 heads of 16, SwiGLU 192, RMSNorm 1e-6, RoPE 10,000,
tied embeddings, 131 words, float32: a plain Hugging Face folder, which transformers and this repository's server open.

## How to prompt it

    python -m launch.serve            # serves this folder on 127.0.0.1:8000

Send one user message of exactly this form; every word is separated by one space, and other words are unknown to it:

    {example["prompt"]}

It thinks, then answers (one that it gets right):

{shown}

A step tries one first operation and lists what + - * make of its result and the remaining number (`big` from 100 on).
With `chat_template_kwargs={{"enable_thinking": false}}` the thought is closed at once and it answers directly, which is
a guess: it is shipped for the contrast. Raw prompts: `<bos> {example["prompt"]} <think>` (or `... <think> </think>`).
Greedy decoding, 150 new tokens. `jaxstack.reasoning.grade` judges an answer. There is no system prompt and nothing to
chat about.

## How it was made

From scratch, by this repository's own data generator, trainer and engine:

    python -m launch.make_embedded_model --workdir=work/embedded --install

| stage | data | steps | peak learning rate | trained tokens | wall clock |
|---|---|---|---|---|---|
{rows}

Base: 60 % prompts followed by 1 to 6 random search steps that never stop, 25 % one step that hits with its check and
answer, 15 % direct answers. SFT: 75 % searches in canonical order up to the first hit, 25 % direct answers. The empty
thought of a direct answer stands on the prompt's side and is not trained. Rows of 272 tokens,
{stages["sft"]["batch_rows"]} a step, AdamW (b2 0.98, weight decay 0.01, clip 1), cosine to 5 %. Wall clock: on a shared
two-core machine.

Problems are split by multiset of numbers and target: 2,458 to train on, 600 held out (2,421 held-out prompts). None of
the prompts measured below, nor any other order of their numbers, was used while the recipe was developed.

## Figures

{measured["problems"]} held-out prompts (shuffle seed {measured["shuffle_seed"]}), {measured["sampling"]}:

| | accuracy |
|---|---|
| thinking | {measured["accuracy"]:.3f} |
| no thinking | {measured["accuracy_no_thinking"]:.3f} |

| candidates to reject before the first hit | thinking | no thinking |
|---|---|---|
{by_depth}

Retrained with other versions of jax or on another processor the weights differ in bits and the figures by a few points.
`training.json` holds seeds, data digests, versions, and the sha256 of every file.
"""


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
    for name in _SHIPPED:
        shutil.copyfile(sft.model_folder / name, folder / name)
    generation = json.loads((folder / "generation_config.json").read_text()) | {"do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    measured = figures(*measure(folder, _EVALUATE.value))
    record = training_record(folder, workdir, {"base": (base_config, base), "sft": (sft_config, sft)}, measured)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "MODEL.md").write_text(model_card(record))
    if _INSTALL.value:
        home = Path(jaxstack.models.embedded.__file__).parent / "countdown"
        home.mkdir(exist_ok=True)
        for name in (*_SHIPPED, "training.json", "MODEL.md"):
            shutil.copyfile(folder / name, home / name)
    return {
        "accuracy": measured["accuracy"],
        "accuracy_no_thinking": measured["accuracy_no_thinking"],
        "problems": measured["problems"],
        "model": str(folder),
        "size_bytes": sum((folder / name).stat().st_size for name in _SHIPPED),
        "installed": _INSTALL.value,
        "wall_s": round(time.perf_counter() - began, 1),
    }


if __name__ == "__main__":
    job.main(run)
