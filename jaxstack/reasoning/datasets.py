"""Named data sets, written as the JSONL files that `jaxstack.training` reads.

countdown_base    the base stage: local skills without search order (`traces.base_sample`)
countdown_sft     the SFT stage: search traces and direct answers (`traces.sft_sample`)
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxstack.reasoning import countdown, traces
from jaxstack.reasoning.tokenizer import BOS, build_tokenizer
from jaxstack.runtime.errors import UserError

_SAMPLERS: dict[str, Callable[[countdown.Problem, random.Random], traces.Sample]] = {
    "countdown_base": traces.base_sample,
    "countdown_sft": traces.sft_sample,
}


def samples(name: str, *, size: int, seed: int) -> Iterator[traces.Sample]:
    """`size` samples of the named data set, on training prompts drawn uniformly with replacement.

    The same arguments give the same samples, and a larger `size` only appends.

    Raises:
      UserError: unknown name, or `size` below 1.
    """
    if name not in _SAMPLERS:
        raise UserError(f"data set {name!r} is unknown; known are {', '.join(sorted(_SAMPLERS))}")
    if size < 1:
        raise UserError(f"data set {name}: size is {size}, expected at least 1")
    rng = random.Random(f"{name} {seed}")
    pool = countdown.prompts("train")
    for _ in range(size):
        yield _SAMPLERS[name](rng.choice(pool), rng)


def training_row(sample: traces.Sample) -> dict[str, Any]:
    """A sample as one JSON row of `jaxstack.training`.

    What the template's generation prompt writes (`<think>`, or `<think> </think>` without thinking) is the prompt's: it
    is not trained. A text that does not stop cannot be a conversation, whose turns end in `<eos>`; it becomes token ids
    with a mask.
    """
    opening = traces.THINK if sample.thinking else f"{traces.THINK} {traces.END_THINK}"
    if not sample.stops:
        encode = build_tokenizer().encode
        prompt = encode(f"{BOS} {sample.problem.content} {opening}").ids
        response = encode(sample.response).ids
        return {"token_ids": prompt + response, "loss_mask": [0] * len(prompt) + [1] * len(response)}
    messages = [
        {"role": "user", "content": sample.problem.content},
        {"role": "assistant", "content": f"{opening} {sample.response}"},
    ]
    return {"messages": messages, "chat_template_kwargs": {"enable_thinking": sample.thinking}}


def write_dataset(name: str, path: str | Path, *, size: int, seed: int) -> None:
    """Writes `size` samples of the named data set as JSONL, whole or not at all.

    Args:
      name: "countdown_base" or "countdown_sft".
      path: the file; its folder is made.
      size: how many rows.
      seed: of the sampling; the same name, size and seed give the same bytes.

    Raises:
      UserError: unknown name, or `size` below 1.
    """
    path = Path(path)
    rows = samples(name, size=size, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("w", encoding="utf-8") as file:
        for sample in rows:
            file.write(json.dumps(training_row(sample)) + "\n")
    os.replace(unfinished, path)
