"""The configuration of a supervised fine-tuning run."""

import dataclasses
import math
from typing import Literal

from jaxstack.models import DecoderConfig
from jaxstack.models.decoder import Remat
from jaxstack.models.lora import LoraConfig
from jaxstack.runtime.checkpoint import Keep
from jaxstack.runtime.errors import UserError
from jaxstack.training.data import DataConfig
from jaxstack.training.optimizer import OptimizerConfig
from jaxstack.training.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ResumeConfig:
    """What happens in a workdir that holds checkpoints.

    Attributes:
      enabled: go on from the newest; False refuses instead.
      allow_changes: go on even if the config or the data differ from the run that saved them.
    """

    enabled: bool = True
    allow_changes: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A supervised fine-tuning run.

    Attributes:
      model: Hugging Face folder to start from, or the configuration of a fresh model.
      tokenizer: folder with the tokenizer; None for the model folder's own. A fresh model without one takes
        pre-tokenised rows.
      data: where examples come from.
      lora: train adapters of this shape; None trains all parameters.
      optimizer: rule and schedule.
      batch_rows: packed rows in a microbatch.
      accum_steps: microbatches in a step; token-exact, so the product with batch_rows is what counts.
      seq_len: tokens in a row.
      max_steps, epochs: length of the run; the shorter of the two if both are given.
      log_every, save_every, eval_every: in steps; None for at the end only. An evaluation takes the held-out data and
        what the model writes, whichever the run was given.
      keep: which checkpoints stay.
      remat: what the backward pass recomputes: nothing, all but matrix products ("dots"), or every layer ("full").
      unroll_layers: compile every layer by itself: on a CPU a few percent quicker steps for a longer start.
      chunk_tokens: compute logits for so many tokens at a time; for vocabularies above ~32k.
      router_aux_loss_coef: of a mixture of experts: adds so many times the load-balancing loss of its routers to the
        trained loss, not to that of held-out data (`decoder_loss`); 0 only logs it, None leaves it out.
      param_dtype: of parameters in memory. bfloat16 for the frozen model under `lora` only: full training needs float32
        masters, since most updates are below half a bfloat16 ulp and would vanish.
      compute_dtype: of activations; "auto" is float32 on CPU and bfloat16 elsewhere.
      export_dtype: of the saved model; None for param_dtype.
      mesh: the devices that share the run; one by default. A run may go on with another mesh.
      seed: of a fresh model, adapters and the order of the data.
      resume: what happens in a workdir that holds checkpoints.
    """

    model: str | DecoderConfig
    tokenizer: str | None = None
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraConfig | None = None
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    batch_rows: int = 8
    accum_steps: int = 1
    seq_len: int = 1024
    max_steps: int | None = None
    epochs: float | None = None
    log_every: int = 10
    save_every: int | None = None
    eval_every: int | None = None
    keep: Keep = dataclasses.field(default_factory=Keep)
    remat: Remat = "none"
    unroll_layers: bool = False
    chunk_tokens: int | None = None
    router_aux_loss_coef: float | None = None
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    export_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0
    resume: ResumeConfig = dataclasses.field(default_factory=ResumeConfig)

    def __post_init__(self) -> None:
        for name in ("batch_rows", "accum_steps", "log_every"):
            _require(name, getattr(self, name), at_least=1)
        _require("seq_len", self.seq_len, at_least=2)
        for name in ("max_steps", "save_every", "eval_every", "chunk_tokens"):
            if getattr(self, name) is not None:
                _require(name, getattr(self, name), at_least=1)
        coef = self.router_aux_loss_coef
        if coef is not None and not 0 <= coef < math.inf:
            raise UserError(f"router_aux_loss_coef={coef}: expected a number of at least 0, or none")
        if self.max_steps is None and self.epochs is None:
            raise UserError("max_steps and epochs are both none; expected one of them, or the run has no end")
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise UserError(f"epochs={self.epochs}: expected a positive number")
        for name, allowed in (
            ("remat", ("none", "dots", "full")),
            ("param_dtype", ("float32", "bfloat16")),
            ("compute_dtype", ("auto", "float32", "bfloat16")),
            ("export_dtype", (None, "float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(str, allowed))}")
        if self.param_dtype == "bfloat16" and self.lora is None:
            raise UserError(
                "param_dtype='bfloat16' without lora: most updates would round to nothing; expected float32"
            )
        for name in ("batch_rows", "chunk_tokens"):
            if (size := getattr(self, name)) is not None and size % self.mesh.row_shares:
                raise UserError(
                    f"{name}={size}: expected a multiple of mesh.data * mesh.fsdp = {self.mesh.row_shares}, the "
                    "devices that rows are dealt out over"
                )
        if not isinstance(self.model, str | DecoderConfig):
            raise UserError(f"model={self.model!r}: expected a folder or a DecoderConfig")


def _require(name: str, value: int, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UserError(f"{name}={value!r}: expected an integer of at least {at_least}")
