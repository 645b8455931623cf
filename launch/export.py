"""Merges a PEFT adapter into its model, or changes a model's dtype: folders in, a Hugging Face folder out.

python -m launch.export --model=BASE --adapter=work/sft/adapter --out=work/merged --dtype=bfloat16
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import flags, logging

from jaxstack.models import lora
from jaxstack.models.checkpoint import load_decoder, save_decoder
from jaxstack.models.hf_config import stored_dtype
from jaxstack.models.peft_format import load_adapters
from launch import job

_MODEL = flags.DEFINE_string("model", None, "Hugging Face folder of the model")
_ADAPTER = flags.DEFINE_string("adapter", None, "PEFT folder to merge into it; none only converts")
_OUT = flags.DEFINE_string("out", None, "folder to write")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "of the weights; the model's by default")


def run() -> dict[str, Any]:
    logging.set_verbosity(logging.WARNING)
    folder, out = _MODEL.value, _OUT.value
    if not folder:
        raise job.BadUsage("--model is missing; expected a folder")
    if not out:
        raise job.BadUsage("--out is missing; expected a folder")
    # The sum is made in float32 whatever the model is stored in, and rounded once.
    model = load_decoder(folder, param_dtype=jnp.float32)
    config = Path(folder) / "config.json"
    dtype = jnp.dtype(_DTYPE.value or stored_dtype(json.loads(config.read_text()), source=str(config)))
    merged = 0
    if _ADAPTER.value:
        (adapter,) = load_adapters(model, [_ADAPTER.value])
        merged = len(adapter.factors)
        model = lora.merge(model)
    save_decoder(model, out, dtype=dtype, tokenizer_from=folder)
    return {"model_folder": out, "merged_modules": merged, "dtype": dtype.name}


if __name__ == "__main__":
    job.main(run)
