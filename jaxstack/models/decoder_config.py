"""What shapes a decoder: sizes, and the points in which the families differ."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from jaxstack.models.rope import RopeConfig
from jaxstack.runtime.errors import UserError

Activation = Literal["silu", "gelu_tanh"]
Norm = Literal["rms", "rms_offset", "layer"]


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """A mixture of experts in place of the MLP.

    Attributes:
      num_experts: experts a layer.
      experts_per_token: how many of them, the likeliest, a token goes through.
      intermediate_size: features inside one expert.
      weight_norm: the chosen experts' probabilities are divided by their p-norm of this order, 1 being their sum; None
        for as they are.
      dense_layers: layers that have a plain MLP all the same, ascending.

    Raises:
      UserError: one line naming the field, what was found and what was expected.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    weight_norm: float | None = 1.0
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ("num_experts", "experts_per_token", "intermediate_size"):
            _require_positive_integer(f"moe.{name}", getattr(self, name))
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"moe.experts_per_token: found {self.experts_per_token}, expected at most num_experts = "
                f"{self.num_experts}"
            )
        if self.weight_norm is not None:
            _require_positive("moe.weight_norm", self.weight_norm)
        if list(self.dense_layers) != sorted(set(self.dense_layers)) or any(i < 0 for i in self.dense_layers):
            raise UserError(f"moe.dense_layers: found {self.dense_layers}, expected ascending layer numbers from 0")


class Segment(NamedTuple):
    """Layers [start, stop), all with a mixture of experts or all without; `first` is how many of their kind precede."""

    start: int
    stop: int
    sparse: bool
    first: int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that shapes a decoder. Sizes are counts of features, heads, layers or tokens.

    Attributes:
      architecture: the Hugging Face class that a saved folder names, such as "Qwen3ForCausalLM".
      head_dim: features per head; need not be hidden_size / num_heads.
      activation: of the gate: "silu", or "gelu_tanh", the tanh form of GELU.
      norm: "rms": RMSNorm, cast to the activations' dtype, then times its weight; "rms_offset": times (1 + weight),
        then cast; "layer": LayerNorm without bias.
      rms_norm_eps: of any of the norms.
      branch_norms: a norm after attention and after the MLP too, before they are added back.
      rope, local_rope: the rotation; local_rope that of layers with a window, None for the same.
      tie_word_embeddings: the embedding matrix is also the output matrix.
      scale_embeddings: embeddings are multiplied by sqrt(hidden_size), rounded to the activations' dtype.
      qkv_bias, attention_out_bias, mlp_bias: which projections carry a bias.
      qkv_clip: queries, keys and values are clipped to +-this before the rotation; None for not.
      qk_norm: RMSNorm of every query and key head before the rotation.
      query_pre_attn_scalar: scores are multiplied by this to the power of -1/2; None for head_dim.
      attention_softcap, logits_softcap: bound the scaled scores and the logits, x becoming c * tanh(x / c); None for
        not.
      layer_windows: one entry a layer, the sliding window in tokens or None for full attention; () for full everywhere.
      moe: the mixture of experts that stands for the MLP; None for none.
      eos_token_ids: any of them ends a generation.
      initializer_range: standard deviation of a fresh model's matrices.

    Raises:
      UserError: one line naming the field, what was found and what was expected.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: Activation = "silu"
    norm: Norm = "rms"
    rms_norm_eps: float = 1e-6
    branch_norms: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    local_rope: RopeConfig | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    scale_embeddings: bool = False
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qkv_clip: float | None = None
    qk_norm: bool = False
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    layer_windows: tuple[int | None, ...] = ()
    moe: MoeConfig | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            _require_positive_integer(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_kv_heads: found {self.num_kv_heads}, expected a divisor of num_heads = {self.num_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim: found {self.head_dim}, expected an even number (heads are rotated in halves)")
        for name in ("rms_norm_eps", "initializer_range"):
            _require_positive(name, getattr(self, name))
        for name in ("qkv_clip", "query_pre_attn_scalar", "attention_softcap", "logits_softcap"):
            if getattr(self, name) is not None:
                _require_positive(name, getattr(self, name))
        if not self.layer_windows:
            object.__setattr__(self, "layer_windows", (None,) * self.num_layers)
        if len(self.layer_windows) != self.num_layers:
            raise UserError(
                f"layer_windows: found {len(self.layer_windows)} entries, expected one a layer, {self.num_layers}"
            )
        for window in self.layer_windows:
            if window is not None:
                _require_positive_integer("layer_windows", window)
        for name, choices in {"activation": get_args(Activation), "norm": get_args(Norm)}.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: found {getattr(self, name)!r}, expected one of {', '.join(choices)}")
        self.rope.rotated(self.head_dim)
        if self.local_rope is not None and self.local_rope.rotated(self.head_dim) != self.rope.rotated(self.head_dim):
            raise UserError("local_rope.partial_rotary_factor: expected that of rope")
        if self.moe is not None and self.moe.dense_layers and self.moe.dense_layers[-1] >= self.num_layers:
            raise UserError(
                f"moe.dense_layers: found {self.moe.dense_layers[-1]}, expected numbers below num_layers = "
                f"{self.num_layers}"
            )
        ids = {
            "bos_token_id": (self.bos_token_id,),
            "pad_token_id": (self.pad_token_id,),
            "eos_token_ids": self.eos_token_ids,
        }
        for name, values in ids.items():
            for value in values:
                if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                    raise UserError(f"{name}: found {value!r}, expected token ids >= 0")

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        scalar = self.query_pre_attn_scalar
        return (self.head_dim if scalar is None else scalar) ** -0.5

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Layers with a mixture of experts."""
        return tuple(i for i in range(self.num_layers) if self.moe is not None and i not in self.moe.dense_layers)

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers with a plain MLP."""
        return tuple(i for i in range(self.num_layers) if self.moe is None or i in self.moe.dense_layers)

    def segments(self) -> Iterator[Segment]:
        """The runs of layers that are built alike, in order."""
        sparse = set(self.sparse_layers)
        seen = {False: 0, True: 0}
        start = 0
        for stop in range(1, self.num_layers + 1):
            kind = start in sparse
            if stop == self.num_layers or (stop in sparse) != kind:
                yield Segment(start, stop, kind, seen[kind])
                seen[kind] += stop - start
                start = stop

    def for_context(self, tokens: int) -> "DecoderConfig":
        """This, for sequences of up to `tokens`: see `RopeConfig.for_context`."""
        local = None if self.local_rope is None else self.local_rope.for_context(tokens)
        return replace(self, rope=self.rope.for_context(tokens), local_rope=local)


def _require_positive_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise UserError(f"{name}: found {value!r}, expected a positive integer below 2^31")


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise UserError(f"{name}: found {value!r}, expected a positive number")
