"""What `launch.make_embedded_model` writes beside the weights: measured figures, training.json and MODEL.md."""

import dataclasses
import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxstack.engine import Engine, EngineConfig
from jaxstack.reasoning.countdown import held_out, solve
from jaxstack.reasoning.evaluation import Outcome, accuracy, answer_problems
from jaxstack.runtime.metrics import read_rows
from jaxstack.serving import EngineModel
from jaxstack.training import SftConfig, TrainResult

# Shuffle of the held-out prompts for final figures; development used prompts of other problems.
FINAL_SHUFFLE = 5
SHIPPED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def measure(folder: Path, count: int) -> tuple[list[Outcome], list[Outcome]]:
    """Greedy answers to `count` held-out prompts, with and without thinking."""
    model = EngineModel(Engine.from_folder(folder, EngineConfig(max_sequences=32, max_batch_tokens=256)))
    problems = held_out(count, seed=FINAL_SHUFFLE)
    return answer_problems(model, problems, thinking=True), answer_problems(model, problems, thinking=False)


def figures(thinking: Sequence[Outcome], direct: Sequence[Outcome]) -> dict[str, Any]:
    """The measured accuracy as training.json and MODEL.md state it."""
    depths = sorted({_depth(outcome) for outcome in thinking})
    example = next((o for o in thinking if o.correct and _depth(o) == 1), thinking[0])
    return {
        "problems": len(thinking),
        "shuffle_seed": FINAL_SHUFFLE,
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
    folder: Path, workdir: Path, seed: int, stages: dict[str, tuple[SftConfig, TrainResult]], measured: dict[str, Any]
) -> dict[str, Any]:
    """What training.json holds: how the files in `folder` came to be, and their digests."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
    return {
        "made_by": "python -m launch.make_embedded_model",
        "seed": seed,
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
        "sha256": {name: _sha256(folder / name) for name in SHIPPED},
    }


def model_card(record: dict[str, Any]) -> str:
    """MODEL.md."""
    measured, stages = record["measured"], record["stages"]
    sft = stages["sft"]
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

| stage | data | steps | peak learning rate | trained tokens | time |
|---|---|---|---|---|---|
{rows}

Base: 60 % prompts followed by 1 to 6 random search steps that never stop, 25 % one step that hits with its check and
answer, 15 % direct answers. SFT: 75 % searches in canonical order up to the first hit, 25 % direct answers. The empty
thought of a direct answer stands on the prompt's side and is not trained.

Packed rows of {sft["seq_len"]} tokens, {sft["batch_rows"]} rows a step,
AdamW (b2 0.98, weight decay 0.01, clip 1), cosine to 5 %, initial weights of standard deviation 0.125. Time: of the
training steps alone, on two cores that other work shared.

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
