"""Long-CoT SFT of Qwen2.5-32B-Instruct on 17k demonstrations with LoRA, for eight devices of 80 GB.

The recipe of arXiv 2502.07374 (Sky-T1): 3 epochs, 96 sequences a step, LoRA of rank 64, learning rate 1e-4 (full
training: 1e-5), cosine with a tenth of warm-up. Batch and epochs are from the published training files; rank, alpha,
the LoRA rate and the warm-up are recalled from the paper, whose repository holds no LoRA configuration.

    python -m launch.reproduce --paper=longcot --scale=full --workdir=work/longcot_full        # sizes, memory, hours
    python -m launch.sft --config=configs/longcot_sft_qwen32b.py --config.model=FOLDER --config.data.paths=FILE.jsonl
"""

import dataclasses

from jaxstack.models import DecoderConfig
from jaxstack.models.rope import RopeConfig
from jaxstack.training import DataConfig, LoraConfig, OptimizerConfig, SftConfig

QWEN25_32B = DecoderConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=152_064,
    hidden_size=5120,
    intermediate_size=27_648,
    num_layers=64,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    qkv_bias=True,
    rope=RopeConfig(theta=1e6),
    max_position_embeddings=32_768,
)
QWEN25_7B = dataclasses.replace(
    QWEN25_32B,
    hidden_size=3584,
    intermediate_size=18_944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    layer_windows=(),
)
SEQ_LEN = 16_384


def get_config() -> SftConfig:
    """The run of 32 billion parameters: 24 rows of 16,384 tokens a step are about 96 sequences of 4,100."""
    return SftConfig(
        model=QWEN25_32B,
        data=DataConfig(overflow="drop"),
        lora=LoraConfig(r=64, alpha=128.0),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_ratio=0.1, schedule="cosine"),
        batch_rows=8,
        accum_steps=3,
        seq_len=SEQ_LEN,
        epochs=3,
        save_every=50,
        remat="full",
        chunk_tokens=1024,
        param_dtype="bfloat16",
        compute_dtype="bfloat16",
    )
