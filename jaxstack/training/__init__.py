"""Training: examples and a model in, a Hugging Face folder out.

How data passes through: rows of JSONL or Parquet become token ids and loss masks (`parquet`, `chat`, `data`), several
share a row of fixed length (`packing`), and a thread hands batches to the loop (`loop`). The step (`step`) is one
jitted function of pytrees for every loss (`losses`), every optimizer (`optimizer`), and full or adapter training
(`jaxstack.models.lora`); `sharding` lays it out over several devices. At evaluations an engine may write with the
weights being trained (`generation`). `sft` ties them together, checkpoints through `jaxstack.runtime.checkpoint`, and
leaves `workdir/model`, or an adapter folder (`jaxstack.models.peft_format`).

Rewards (`rl`, with `rollouts` for their batches) and pairs of answers (`preference`) are further losses of that step.
"""

from jaxstack.models.lora import LoraConfig
from jaxstack.models.peft_format import load_adapters, save_peft
from jaxstack.training.config import ResumeConfig, SftConfig
from jaxstack.training.data import DataConfig, Example
from jaxstack.training.generation import GenerationEval
from jaxstack.training.losses import LossFn, LossParts, cross_entropy
from jaxstack.training.optimizer import OptimizerConfig
from jaxstack.training.preference import Dpo, Preference, dpo_loss, pair_batches
from jaxstack.training.rl import Dapo, DrGrpo, Grpo, Loop, PpoClip, Reinforce
from jaxstack.training.rollouts import Rollout, rollout_batches
from jaxstack.training.sft import TrainResult, train_sft
from jaxstack.training.sharding import MeshConfig
from jaxstack.training.step import TrainState, make_train_step

__all__ = [
    "Dapo",
    "DataConfig",
    "Dpo",
    "DrGrpo",
    "Example",
    "GenerationEval",
    "Grpo",
    "Loop",
    "LoraConfig",
    "LossFn",
    "LossParts",
    "MeshConfig",
    "OptimizerConfig",
    "PpoClip",
    "Preference",
    "Reinforce",
    "ResumeConfig",
    "Rollout",
    "SftConfig",
    "TrainResult",
    "TrainState",
    "cross_entropy",
    "dpo_loss",
    "load_adapters",
    "make_train_step",
    "pair_batches",
    "rollout_batches",
    "save_peft",
    "train_sft",
]
