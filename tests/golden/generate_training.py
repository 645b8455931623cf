"""Makes `training/` in this folder: losses and gradients by transformers and PEFT. Needs torch; the tests do not.

    .venv-peers/bin/python tests/golden/generate_training.py

`training/gradients.npz`: three documents with loss masks, the token-mean loss of `decoder/qwen2` on them (each document
by itself, float32) and the gradient of every parameter; then the same for the adapter, with its gradients and one
document's logits.
`training/adapter/`: the adapter, saved by PEFT: rsLoRA, with a rank and an alpha of its own for some modules.
"""

import shutil
from pathlib import Path

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).parent
OUT = HERE / "training"


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    made = []
    for length, prompt in ((23, 9), (7, 2), (15, 1)):
        made.append((rng.integers(0, 97, length), (np.arange(length) >= prompt).astype(np.int64)))
    return made


def load() -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(
        HERE / "decoder" / "qwen2", dtype=torch.float32, attn_implementation="eager"
    ).train()


def token_mean_loss(model: torch.nn.Module) -> torch.Tensor:
    total, count = torch.zeros(()), 0
    for ids, mask in documents():
        labels = torch.tensor(np.where(mask, ids, -100))[None]
        logits = model(torch.tensor(ids)[None]).logits
        total = total + torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        count += int((labels[0, 1:] != -100).sum())
    return total / count


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    arrays: dict[str, np.ndarray] = {}
    for i, (ids, mask) in enumerate(documents()):
        arrays[f"ids_{i}"], arrays[f"mask_{i}"] = ids, mask

    model = load()
    loss = token_mean_loss(model)
    loss.backward()
    arrays["loss"] = loss.detach().numpy()
    for name, parameter in model.named_parameters():
        arrays[f"grad/{name}"] = parameter.grad.numpy()

    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 2, "layers.1.mlp.down_proj": 5},
        alpha_pattern={"q_proj": 3},
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(load(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(OUT / "adapter")
    (OUT / "adapter" / "README.md").unlink(missing_ok=True)
    settings = OUT / "adapter" / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(HERE), "tests/golden"))
    loss = token_mean_loss(adapted)
    loss.backward()
    arrays["lora_loss"] = loss.detach().numpy()
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            arrays[f"lora_grad/{name.replace('.default', '')}"] = parameter.grad.numpy()
    with torch.no_grad():
        arrays["lora_logits"] = adapted(torch.tensor(documents()[0][0])[None]).logits[0].numpy()
    np.savez_compressed(OUT / "gradients.npz", **arrays)


if __name__ == "__main__":
    main()
