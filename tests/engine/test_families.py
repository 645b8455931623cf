"""Families that differ from the plain decoder, served: greedy answers are those of forward passes without any cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models import Decoder, DecoderConfig, MoeConfig, RopeConfig, dense_attention

SIZES = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
GEMMA = DecoderConfig(
    architecture="Gemma3ForCausalLM",
    num_layers=3,
    activation="gelu_tanh",
    norm="rms_offset",
    branch_norms=True,
    scale_embeddings=True,
    tie_word_embeddings=True,
    qk_norm=True,
    rope=RopeConfig(theta=1e6, rope_type="linear", factor=4.0),
    local_rope=RopeConfig(),
    query_pre_attn_scalar=2.0,
    attention_softcap=2.0,
    logits_softcap=6.0,
    layer_windows=(7, None, 7),
    **SIZES,
)
MOE = DecoderConfig(  # plain MLPs among layers with experts
    architecture="Qwen3MoeForCausalLM",
    num_layers=4,
    qk_norm=True,
    moe=MoeConfig(num_experts=5, experts_per_token=2, intermediate_size=24, dense_layers=(1,)),
    **SIZES,
)
PHI3 = DecoderConfig(  # a prompt of 10 tokens becomes longer than the pretraining context as it is answered
    architecture="Phi3ForCausalLM",
    num_layers=2,
    rope=RopeConfig(
        rope_type="longrope",
        factor=4.0,
        original_max_position_embeddings=16,
        short_factor=(1.0,) * 6,
        long_factor=(3.0,) * 6,
        partial_rotary_factor=0.75,
    ),
    **SIZES,
)
FAMILIES = {"gemma": GEMMA, "moe": MOE, "phi3": PHI3}


def random_decoder(config):
    decoder = Decoder.abstract(config)
    generator = np.random.default_rng(0)

    def fresh(path, x):
        return jnp.asarray(0.3 * generator.standard_normal(x.shape, np.float32) + ("norm" in str(path)))

    nnx.update(decoder, jax.tree_util.tree_map_with_path(fresh, nnx.state(decoder, nnx.Param)))
    return decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_plain_forward_passes(family):
    decoder = random_decoder(FAMILIES[family])
    graph, state = nnx.split(nnx.clone(decoder))

    @jax.jit
    def logits(tokens):
        return nnx.merge(graph, state)(tokens, jnp.arange(64), dense_attention())[0]

    generator = np.random.default_rng(1)
    stem = generator.integers(0, 83, 20).tolist()
    prompts = [stem[:18], [*stem, 5, 6], [3], [*stem, 5, 7, 8, 9], generator.integers(0, 83, 33).tolist()]
    engine = Engine(decoder, None, EngineConfig(max_sequences=4, max_batch_tokens=16, page_size=4, num_pages=40))
    engine.warm_up(progress=False)
    outputs = engine.generate(prompts, SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True))
    assert engine.runner.recompilations == 0
    compared = 0
    for prompt, output in zip(prompts, outputs):
        answer = output.completions[0].token_ids
        assert len(answer) == 16
        sequence = np.zeros(64, np.int32)
        sequence[: len(prompt) + 16] = [*prompt, *answer]
        rows = np.asarray(logits(sequence))[len(prompt) - 1 :][:16]
        best = np.sort(rows, axis=-1)
        for row, token, margin in zip(rows, answer, best[:, -1] - best[:, -2]):
            if margin > 1e-4:  # below that rounding decides
                assert token == row.argmax()
                compared += 1
    assert compared > 70
