"""Makes `training/` in this folder: losses and gradients by transformers and PEFT. Needs torch; the tests do not.

    .venv-peers/bin/python tests/golden/generate_training.py

`training/gradients.npz`: three documents with loss masks, the token-mean loss of `decoder/qwen2` on them (each document
by itself, float32) and the gradient of every parameter; then the same for the adapter, with its gradients and one
document's logits.
`training/adapter/`: the adapter, saved by PEFT: rsLoRA, with a rank and an alpha of its own for some modules.
`training/dora.npz`, `training/dora_adapter/`: the same of a DoRA whose magnitudes have moved, one target in one layer.
`training/router.npz`: transformers' load-balancing loss of three routers' scores under a mask, and its gradient.
"""

import shutil
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

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


def adapter_arrays(adapted: torch.nn.Module, folder: Path, prefix: str) -> dict[str, np.ndarray]:
    """Saves an adapter; its loss, gradients and one document's logits."""
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    settings = folder / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(HERE), "tests/golden"))
    loss = token_mean_loss(adapted)
    loss.backward()
    arrays = {f"{prefix}_loss": loss.detach().numpy()}
    for name, parameter in adapted.named_parameters():
        if parameter.grad is not None:
            arrays[f"{prefix}_grad/{name.replace('.default', '')}"] = parameter.grad.numpy()
    with torch.no_grad():
        arrays[f"{prefix}_logits"] = adapted(torch.tensor(documents()[0][0])[None]).logits[0].numpy()
    return arrays


def gradients() -> None:
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
    arrays |= adapter_arrays(adapted, OUT / "adapter", "lora")
    np.savez_compressed(OUT / "gradients.npz", **arrays)


def dora() -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        target_modules=["q_proj", "o_proj", "layers.1.mlp.down_proj"],
        rank_pattern={"o_proj": 2},
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(load(), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    np.savez_compressed(OUT / "dora.npz", **adapter_arrays(adapted, OUT / "dora_adapter", "dora"))


def router() -> None:
    torch.manual_seed(3)
    scores = torch.randn(3, 2 * 7, 5, requires_grad=True)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, 5:] = mask[1, 3:] = 0
    loss = load_balancing_loss_func(tuple(scores), num_experts=5, top_k=2, attention_mask=mask)
    loss.backward()
    arrays = {"scores": scores.detach(), "mask": mask, "loss": loss.detach(), "gradient": scores.grad}
    np.savez_compressed(OUT / "router.npz", **{name: array.numpy() for name, array in arrays.items()})


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    gradients()
    dora()
    router()


if __name__ == "__main__":
    main()
