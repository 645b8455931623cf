"""Li, Cao, Griggs et al., "LLMs Can Easily Learn to Reason from Demonstrations: Structure, not content, is what
matters!" (arXiv 2502.07374), in miniature: one small base model, demonstrations perturbed in content or in structure,
and what each version teaches.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from flax import nnx

from jaxstack.models import Decoder
from jaxstack.models.lora import sites
from jaxstack.reasoning.longcot.config import study_config
from jaxstack.reasoning.longcot.report import PAPER
from jaxstack.reasoning.longcot.steps import keyword_spans, split_steps
from jaxstack.reasoning.longcot.study import run_study
from jaxstack.runtime.errors import UserError
from jaxstack.runtime.metrics import write_summary
from jaxstack.training import SftConfig
from jaxstack.training.chat import messages_of_sharegpt
from jaxstack.training.data import read_jsonl
from launch import job

_TASK = flags.DEFINE_enum("task", "relay", ["relay", "countdown"], "relay: the study; countdown: its control")
_SEEDS = flags.DEFINE_integer("seeds", 3, "runs of each cell, with other demonstrations", lower_bound=1)
_FULL_GRID = flags.DEFINE_bool("full_grid", False, "all fractions of the paper, and LoRA")
_FURTHER = flags.DEFINE_bool("further", False, "beyond the paper's grid: LoRA, and fewer demonstrations")
_BASE_STEPS = flags.DEFINE_integer("base_steps", None, "steps of the base stage instead of the recipe's", lower_bound=1)
_SFT_STEPS = flags.DEFINE_integer("sft_steps", None, "steps of each cell instead of the recipe's", lower_bound=1)
_SFT_RATE = flags.DEFINE_float("sft_learning_rate", None, "peak of each cell's learning rate instead of the recipe's")
_PROBLEMS = flags.DEFINE_integer("problems", 256, "held-out problems that each cell answers", lower_bound=1)
_CELLS = flags.DEFINE_list("cells", None, "only these of the grid, by name, for instance correct,wrong,shuffle-1")
_WORKERS = flags.DEFINE_integer("workers", None, "cells side by side; by default one a core, at most 4", lower_bound=1)
_DATA = flags.DEFINE_string("data", None, "with --scale=full: ShareGPT demonstrations (JSONL) to look through")
_RECIPE = flags.DEFINE_string("recipe", "configs/longcot_sft_qwen32b.py", "with --scale=full: the run to plan")
_DEVICES = flags.DEFINE_integer("devices", 8, "with --scale=full: accelerators that share the model", lower_bound=1)

# The published data set: rows, and tokens a row as estimated.
_ROWS, _ROW_TOKENS = 17_000, 4_500
# One H100: bfloat16 peak, the part of it that dense training reaches (estimated), and its memory.
_PEAK_FLOPS, _UTILISATION, _DEVICE_BYTES = 989e12, 0.4, 80e9


def run(workdir: Path, *, scale: str) -> Mapping[str, Any]:
    """Runs the study, or plans the full run. Returns the summary."""
    if scale == "full":
        summary = plan()
        workdir.mkdir(parents=True, exist_ok=True)
        write_summary(workdir, summary)
        return summary
    changes: dict[str, Any] = {"seeds": _SEEDS.value, "problems": _PROBLEMS.value, "workers": _WORKERS.value}
    changes |= {"base_steps": _BASE_STEPS.value} if _BASE_STEPS.value else {}
    changes |= {"sft_steps": _SFT_STEPS.value} if _SFT_STEPS.value else {}
    changes |= {"sft_learning_rate": _SFT_RATE.value} if _SFT_RATE.value is not None else {}
    config = study_config(_TASK.value, full_grid=_FULL_GRID.value, further=_FURTHER.value, **changes)
    if _CELLS.value:
        known = {cell.name: cell for cell in study_config(_TASK.value, full_grid=True, further=True).cells}
        if unknown := [name for name in _CELLS.value if name not in known]:
            raise job.BadUsage(f"--cells: {unknown[0]!r} is unknown; expected some of {', '.join(known)}")
        config = study_config(_TASK.value, **changes, cells=tuple(known[name] for name in _CELLS.value))
    result = run_study(config, workdir)
    print(result.table, file=sys.stderr)
    return result.summary


def plan() -> dict[str, Any]:
    """The full run without weights: shapes, memory of each device, tokens and hours.

    Raises:
      UserError: no such recipe, or data that are no demonstrations.
    """
    config = job.load_config(_recipe_file(_RECIPE.value), SftConfig)
    if isinstance(config.model, str):
        raise UserError(
            f"--recipe: {_RECIPE.value} names the folder {config.model!r}, expected a DecoderConfig to plan"
        )
    decoder = Decoder.abstract(config.model)
    everything = [(site, len(site.modules)) for site in sites(decoder)]
    linear = sum(site.in_features * site.out_features * count for site, count in everything)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder)))
    trainable = parameters
    if config.lora is not None:
        trainable = sum(
            config.lora.rank_of(module) * (site.in_features + site.out_features)
            for site, _ in everything
            for module in site.modules
            if config.lora.matches(module)
        )
    demonstrations = look_through(_DATA.value) if _DATA.value else None
    rows = demonstrations["rows"] if demonstrations else _ROWS
    epochs = config.epochs or 1.0
    tokens = rows * _ROW_TOKENS * epochs
    step_tokens = config.batch_rows * config.accum_steps * config.seq_len
    # Forward 2, backward 4 a parameter and token; frozen weights have no gradient of their own; recomputing costs 2.
    flops = tokens * linear * (2 + (2 if config.lora is not None else 4) + (2 if config.remat == "full" else 0))
    hours = flops / (_DEVICES.value * _PEAK_FLOPS * _UTILISATION) / 3600
    weight_bytes = 2 if config.param_dtype == "bfloat16" else 4
    device_rows = -(-config.batch_rows // _DEVICES.value)
    tokens_here = device_rows * config.seq_len
    model = config.model
    memory = {
        "weights": parameters * weight_bytes / _DEVICES.value,
        # Float32 gradients and two moments, and for full training nothing else: the weights are the masters.
        "gradients_and_moments": trainable * (12 + (4 if config.lora is not None else 0)) / _DEVICES.value,
        # With remat=full each layer keeps its input; one layer at a time is computed again, in bfloat16.
        "activations": tokens_here * 2 * (model.num_layers * model.hidden_size + 4 * model.hidden_size)
        + tokens_here * 2 * 3 * model.intermediate_size,
        "logits": (config.chunk_tokens or tokens_here) * model.vocab_size * 4 * 2,
        # Under fully sharded training a layer's weights are gathered, this one's and the next one's.
        "gathered_layers": 2 * weight_bytes * linear / model.num_layers if _DEVICES.value > 1 else 0,
    }
    total = sum(memory.values())
    summary = {
        "paper": PAPER["source"],
        "parameters": parameters,
        "trainable": trainable,
        "trainable_share": round(trainable / parameters, 4),
        "rows": rows,
        "tokens": round(tokens),
        "steps": -(-round(tokens) // step_tokens),
        "tokens_a_step": step_tokens,
        "devices": _DEVICES.value,
        "device_gb": {name: round(size / 1e9, 1) for name, size in memory.items()} | {"all": round(total / 1e9, 1)},
        "fits": total < _DEVICE_BYTES,
        "hours": round(hours, 1),
        "assumed": {"tokens_a_row": _ROW_TOKENS, "peak_flops": _PEAK_FLOPS, "utilisation": _UTILISATION},
        "demonstrations": demonstrations,
        "expected": PAPER["aime_2024"],
    }
    print(
        f"{parameters / 1e9:.1f}e9 parameters, {trainable / 1e6:.0f}e6 trained; {summary['steps']} steps of "
        f"{step_tokens} tokens; {total / 1e9:.0f} GB on each of {_DEVICES.value} devices; about {hours:.1f} hours "
        f"at {_UTILISATION:.0%} of the peak",
        file=sys.stderr,
    )
    return summary


def look_through(path: str) -> dict[str, Any]:
    """Rows, steps and keywords of ShareGPT demonstrations whose answers hold a thought between tags.

    Raises:
      UserError: a file that cannot be read, or a row without conversations, by file and line.
    """
    rows = without_thought = steps = keywords = 0
    for where, row in read_jsonl([path]):
        if isinstance(row, UserError):
            raise row
        if not isinstance(row.get("conversations"), list):
            raise UserError(f"{where}: found the fields {', '.join(map(repr, row))}, expected 'conversations'")
        try:
            messages = messages_of_sharegpt(row)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        answer = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")
        rows += 1
        for begin, end in (("<|begin_of_thought|>", "<|end_of_thought|>"), ("<think>", "</think>")):
            if answer.count(begin) == answer.count(end) == 1:
                thought = answer.partition(begin)[2].partition(end)[0]
                steps += len(split_steps(thought))
                keywords += len(keyword_spans(thought))
                break
        else:
            without_thought += 1
    if not rows:
        raise UserError(f"{path}: no rows, expected ShareGPT demonstrations")
    thoughts = max(1, rows - without_thought)
    return {
        "rows": rows,
        "without_thought": without_thought,
        "steps_a_thought": round(steps / thoughts, 1),
        "keywords_a_thought": round(keywords / thoughts, 1),
    }


def _recipe_file(path: str) -> Path:
    """The file itself, or the one of that name among the installed configurations."""
    import configs

    file = Path(path)
    packaged = Path(str(configs.__file__)).parent / file.name
    return packaged if not file.is_file() and packaged.is_file() else file
