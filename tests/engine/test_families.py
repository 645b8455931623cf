"""Families that differ from the plain decoder, served: greedy answers are those of forward passes without any cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxstack.engine import Engine, EngineConfig, SamplingParams
from jaxstack.models import Decoder, DecoderConfig, RopeConfig, dense_attention

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
FAMILIES = {"gemma": GEMMA}


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
