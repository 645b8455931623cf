"""Run with eight host devices by `test_engine_mesh.py`: engines over a mesh answer as one on a single device does."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models import Decoder, DecoderConfig, lora
from jaxstack.models.peft_format import save_peft
from jaxstack.runtime.compilation import use_compilation_cache

MODEL = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=102,  # no multiple of the devices
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
SETTINGS = EngineConfig(
    max_sequences=4, max_batch_tokens=32, page_size=4, num_pages=60, max_adapters=1, max_adapter_rank=2, dtype="float32"
)
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, logprobs=2)


def decoder(config: DecoderConfig) -> Decoder:
    model, rng = Decoder.abstract(config), np.random.default_rng(0)
    values = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), nnx.state(model))
    nnx.update(model, values)
    return model


def adapter(folder: Path) -> Path:
    model, rng, config = decoder(MODEL), np.random.default_rng(1), lora.LoraConfig(r=2, alpha=4.0)
    lora.attach(model, config)
    factors = {
        m: dataclasses.replace(f, b=rng.normal(size=f.b.shape).astype(np.float32))
        for m, f in lora.adapter_factors(model, config).items()
    }
    lora.set_adapters(model, [factors])
    save_peft(model, folder, config)
    return folder


def answers(config: DecoderConfig, mesh: Mesh | None, folder: Path):
    engine = Engine(decoder(config), None, dataclasses.replace(SETTINGS, mesh=mesh))
    engine.warm_up(progress=False)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 102, n).tolist() for n in (1, 5, 23, 40, 9)]
    engine.load_adapter("one", folder)
    found = [engine.generate(prompts, GREEDY, adapter=name) for name in (None, "one")]
    assert engine.stats().recompilations == 0
    engine.close()
    return [[c for o in outputs for c in o.completions] for outputs in found]


def agree(ours, theirs) -> int:
    """Tokens compared before a near-tie, where rounding may decide."""
    count = 0
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            if y.top[0][1] - y.top[1][1] < 1e-3:
                break
            assert x.token_id == y.token_id
            assert abs(x.logprob - y.logprob) < 1e-3
            count += 1
    return count


def main() -> None:
    cache, folder = map(Path, sys.argv[1:])
    use_compilation_cache(cache)
    adapter(folder)
    devices = np.array(jax.devices())
    assert len(devices) == 8
    alone = answers(MODEL, None, folder)
    assert [c.token_ids for c in alone[0]] != [c.token_ids for c in alone[1]]
    for shares in (2, 8):  # more key-value heads than devices, and fewer
        shared = answers(MODEL, Mesh(devices[:shares].reshape(1, shares), ("data", "tensor")), folder)
        counts = [agree(ours, theirs) for ours, theirs in zip(shared, alone)]
        assert min(counts) > 30, counts
        print(shares, "devices agree:", counts)


if __name__ == "__main__":
    main()
