"""Long-CoT SFT of Qwen2.5-7B-Instruct with LoRA, for one device of 80 GB: the recipe of 32B made small."""

import dataclasses

from configs.longcot_sft_qwen32b import QWEN25_7B
from configs.longcot_sft_qwen32b import get_config as large
from jaxstack.training import SftConfig


def get_config() -> SftConfig:
    """The same rows a step, one at a time."""
    return dataclasses.replace(large(), model=QWEN25_7B, batch_rows=1, accum_steps=24)
