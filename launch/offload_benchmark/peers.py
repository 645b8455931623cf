"""accelerate itself, where it is installed beside this project."""

import importlib.util
import time
from collections.abc import Callable

import numpy as np

from launch.offload_benchmark.model import Setting


def accelerate(setting: Setting, say: Callable[[str], None]) -> dict[str, float] | None:
    """Tokens/s of transformers' Mixtral under accelerate's `cpu_offload`, its keys and values on the device; None where
    torch, transformers or accelerate are missing, or cannot use the device.
    """
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "accelerate")):
        return None
    import torch
    import transformers
    from accelerate import cpu_offload

    if not torch.cuda.is_available():
        return None
    model = setting.model
    assert model.moe is not None
    config = transformers.MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.moe.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        num_local_experts=model.moe.num_experts,
        num_experts_per_tok=model.moe.experts_per_token,
    )
    began = time.perf_counter()
    with torch.device("meta"):
        network = transformers.MixtralForCausalLM(config).to(getattr(torch, setting.dtype))
    network = network.to_empty(device="cpu").eval()
    with torch.inference_mode():
        for parameter in network.parameters():
            parameter.fill_(0.01)
        network = cpu_offload(network, execution_device="cuda:0")
        cache = transformers.DynamicCache()
        heads = (setting.sequences, model.num_kv_heads, setting.context, model.head_dim)
        for layer in range(model.num_layers):
            empty = torch.zeros(heads, dtype=getattr(torch, setting.dtype), device="cuda:0")
            cache.update(empty, empty.clone(), layer)
        say(f"accelerate: ready after {time.perf_counter() - began:.1f} s, {setting.sequences} sequences")
        tokens = torch.zeros((setting.sequences, 1), dtype=torch.long, device="cuda:0")
        seconds = []
        for _ in range(setting.steps + 1):
            start = time.perf_counter()
            network(input_ids=tokens, past_key_values=cache, use_cache=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    step = float(np.median(seconds[1:]))
    say(f"accelerate: {step * 1e3:.0f} ms a step, {setting.sequences / step:.1f} tokens/s")
    return {"tokens_per_s": setting.sequences / step, "step_s": step, "sequences": setting.sequences}
