"""Base stage of the embedded Countdown model: every local skill, no search order. 168,576 parameters, from scratch.

The data are written by the job itself. Then `configs/sft_countdown.py` teaches the search;
`python -m launch.make_embedded_model` runs both.
"""

from jaxstack.models import DecoderConfig
from jaxstack.models.embedded import embedded_model
from jaxstack.reasoning.tokenizer import BOS, EOS, PAD, VOCABULARY
from jaxstack.training import DataConfig, OptimizerConfig, SftConfig

MODEL = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=len(VOCABULARY),
    hidden_size=64,
    intermediate_size=192,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    rms_norm_eps=1e-6,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=VOCABULARY.index(BOS),
    eos_token_ids=(VOCABULARY.index(EOS),),
    pad_token_id=VOCABULARY.index(PAD),
    # 1/sqrt(hidden_size). With the customary 0.02 so narrow a model needs half again as many steps.
    initializer_range=0.125,
)
# A row holds two of the longest texts (132 tokens), so nothing is dropped.
SEQ_LEN = 272
BATCH_ROWS = 8


def get_config(tokenizer: str | None = None) -> SftConfig:
    """The run; `tokenizer` is the folder of the word-level tokenizer, by default the embedded model's."""
    return SftConfig(
        model=MODEL,
        tokenizer=tokenizer or str(embedded_model("countdown")),
        data=DataConfig(dataset="countdown_base", dataset_size=30_000),
        optimizer=OptimizerConfig(
            learning_rate=4e-3, b2=0.98, weight_decay=0.01, warmup_steps=20, schedule="cosine", end_lr_ratio=0.05
        ),
        batch_rows=BATCH_ROWS,
        seq_len=SEQ_LEN,
        max_steps=1200,
        log_every=10,
        save_every=400,
    )
