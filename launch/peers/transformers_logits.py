"""transformers' side of `launch.compare_transformers`: runs in the peers' environment and imports nothing of ours.

    .venv-peers/bin/python launch/peers/transformers_logits.py SPEC.json

SPEC: `tokens` (npy file, [B, T]), `make` (checkpoints to create with random weights), `logits` (folders to load, each
gets a `logits.npy`, float32). Prints transformers' version.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def make_checkpoint(folder: str, config_class: str, config: dict, dtype: str, seed: int) -> None:
    torch.manual_seed(seed)
    built = getattr(transformers, config_class)(**config)
    model = transformers.AutoModelForCausalLM.from_config(built)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.copy_(1 + noise if "norm" in name and parameter.ndim == 1 else noise)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def write_logits(folder: str, tokens: np.ndarray) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        logits = model.eval()(torch.tensor(tokens, dtype=torch.long)).logits
    np.save(Path(folder) / "logits.npy", logits.numpy())


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    for checkpoint in spec["make"]:
        make_checkpoint(**checkpoint)
    tokens = np.load(spec["tokens"])
    for folder in spec["logits"]:
        write_logits(folder, tokens)
    print(transformers.__version__)


if __name__ == "__main__":
    main()
