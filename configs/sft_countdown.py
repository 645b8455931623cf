"""Supervised fine-tuning on Countdown search traces: what makes the embedded model reason.

On its own (`python -m launch.sft --config=configs/sft_countdown.py --workdir=...`) it trains a fresh model of the
embedded model's shape, in minutes on two cores. As the second stage of `python -m launch.make_embedded_model` it
continues from the base stage.
"""

from configs.countdown_base import BATCH_ROWS, MODEL, SEQ_LEN
from jaxstack.models.embedded import embedded_model
from jaxstack.training import DataConfig, OptimizerConfig, SftConfig


def get_config(model: str | None = None, tokenizer: str | None = None) -> SftConfig:
    """The run.

    Args:
      model: folder of the base stage's model; None for a fresh one.
      tokenizer: folder of the word-level tokenizer, by default the embedded model's.
    """
    return SftConfig(
        model=model or MODEL,
        tokenizer=tokenizer or str(embedded_model("countdown")),
        data=DataConfig(dataset="countdown_sft", dataset_size=30_000),
        optimizer=OptimizerConfig(
            learning_rate=2e-3 if model else 4e-3,
            b2=0.98,
            weight_decay=0.01,
            warmup_steps=20,
            schedule="cosine",
            end_lr_ratio=0.05,
        ),
        batch_rows=BATCH_ROWS,
        seq_len=SEQ_LEN,
        max_steps=1600,
        log_every=10,
        save_every=400,
        seed=1,
    )
