"""The training step: one jitted, donated function of pytrees that serves every loss.

`split_model` takes a module apart once; from then on parameters are flat dictionaries of arrays. `make_train_step`
builds

    (state, frozen, batch) -> (state, metrics)

which differentiates the numerator of the loss with respect to the trainable parameters only, adds numerators and
denominators over microbatches, divides once, clips, and updates, or keeps everything where the gradient is not finite.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxstack.models import Decoder
from jaxstack.models.decoder import Remat, rows_at
from jaxstack.models.moe import RouterSums, load_balancing_loss
from jaxstack.models.training_layout import fuse_for_training
from jaxstack.runtime.errors import UserError
from jaxstack.training.losses import Batch, LossFn, LossParts, Targets, chunked, shift_targets, target_places
from jaxstack.training.optimizer import Optimizer
from jaxstack.training.packed_attention import packed_attention
from jaxstack.training.sharding import Layout

Params = dict[str, Array]
"""Parameters by dotted path: "layers.self_attn.q_proj.kernel" -> [num_layers, in, out]."""

ModelLoss = Callable[[Any, Batch], LossParts]
"""(module, microbatch) -> LossParts."""

Metrics = dict[str, Any]


class TrainState(NamedTuple):
    """Everything a step changes, and so everything a checkpoint holds.

    Attributes:
      step: steps taken, skipped ones included.
      updates: steps that changed the parameters; the schedule runs on it.
      params: trainable parameters.
      opt_state: of the optimizer.
    """

    step: Int[Array, ""]
    updates: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


class SplitModel:
    """A module without its arrays: puts dictionaries of parameters back into it.

    Traversing a module graph costs milliseconds of Python, so this happens while tracing and at export, never in a
    step.
    """

    def __init__(self, graphdef: Any, templates: dict[tuple[Any, ...], Any]):
        self._graphdef = graphdef
        self._templates = templates

    def merge(self, params: Params, frozen: Params | None = None) -> Any:
        """The module holding `params` and `frozen`."""
        arrays = {**params, **(frozen or {})}
        flat = {path: leaf.replace(arrays[_name(path)]) for path, leaf in self._templates.items()}
        return nnx.merge(self._graphdef, nnx.from_flat_state(flat))


def split_model(model: nnx.Module, trainable: Any) -> tuple[SplitModel, Params, Params]:
    """Takes a module apart into (structure, trainable parameters, everything else).

    Args:
      trainable: an nnx filter, such as `nnx.Param` or `LoraParam`.
    """
    graphdef, chosen, rest = nnx.split(model, trainable, ...)
    chosen, rest = dict(nnx.to_flat_state(chosen)), dict(nnx.to_flat_state(rest))
    params, frozen = ({_name(path): leaf.get_value() for path, leaf in part.items()} for part in (chosen, rest))
    # Templates keep each variable's type and metadata; a string in place of the array frees the memory.
    templates = {path: leaf.replace(_name(path)) for path, leaf in {**chosen, **rest}.items()}
    return SplitModel(graphdef, templates), params, frozen


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def decoder_loss(
    loss_fn: LossFn,
    *,
    remat: Remat = "none",
    unroll: bool = False,
    compute_dtype: Any = None,
    chunk_tokens: int | None = None,
    longest: int | None = None,
    most_targets: int | None = None,
    router_aux_loss_coef: float | None = None,
    layout: Layout | None = None,
) -> ModelLoss:
    """The loss of a `Decoder` on packed rows: attention within documents, targets one token ahead.

    Args:
      loss_fn: logits and targets to sums.
      remat, unroll, compute_dtype: as in `Decoder.hidden`.
      chunk_tokens: compute logits for so many tokens at a time; None for all at once.
      longest: no document has more tokens; None for the length of a row. See `packed_attention`.
      most_targets: no microbatch has more target tokens; logits are computed for so many, and with `unroll` on one
        device most of the last layer, too. None for every token.
      router_aux_loss_coef: of a mixture of experts, to add so many times its `load_balancing_loss` to the loss, and to
        log it as `router_aux_loss`; 0 only logs it, None leaves it out. Padding does not count. Not a mean over tokens,
        it is that of each microbatch, averaged over microbatches by their targets.
      layout: where parameters and rows lie, if there are several devices.
    """
    pin = layout.pin_rows if layout is not None else lambda x: x
    alone = layout is None or layout.alone
    attention: Literal["xla"] | None = None if alone else "xla"

    def loss(model: Decoder, batch: Batch) -> LossParts:
        if router_aux_loss_coef is not None and model.config.moe is None:
            raise UserError(f"router_aux_loss_coef={router_aux_loss_coef}: the model has no experts; expected none")
        # Flat from here on: see packed_attention.
        flat = {k: v.reshape(-1) for k, v in batch.items()}
        model = fuse_for_training(model) if alone else model
        if layout is not None:
            model.embed.embedding.set_value(layout.pin_table(model.embed.embedding.get_value()))
        targets = {k: v.reshape(-1) for k, v in shift_targets(batch).items()}
        if "adapter_ids" in flat:  # of the tokens that predict, for the output head's own adapters
            targets["adapter_ids"] = flat["adapter_ids"]
        places = None
        if most_targets is not None and most_targets < targets["weights"].shape[0]:
            places = target_places(targets, most_targets)
            targets = {name: rows_at(x, places) for name, x in targets.items()}
        hidden, _, routing = model.hidden_and_routing(
            flat["token_ids"],
            flat["positions"],
            packed_attention(batch["positions"], longest=longest, implementation=attention),
            None,
            None if router_aux_loss_coef is None else flat["segment_ids"] != 0,
            adapter_ids=flat.get("adapter_ids"),
            remat=remat,
            unroll=unroll,
            compute_dtype=compute_dtype,
            places=places if alone else None,
            pin=pin,
        )
        if places is not None and not alone:
            hidden = rows_at(hidden, places)

        def from_hidden(hidden: Array, targets: Targets) -> LossParts:
            # What was picked out of everyone's rows is dealt out anew, or each device would compute all of it.
            return loss_fn(model.logits(pin(hidden), targets.get("adapter_ids")), targets)

        if chunk_tokens:
            parts = chunked(from_hidden, lambda piece: piece, hidden, targets, chunk_tokens)
        else:
            parts = from_hidden(hidden, targets)
        return parts if routing is None else _with_router_loss(parts, routing, router_aux_loss_coef or 0.0)

    return loss


def _with_router_loss(parts: LossParts, routing: RouterSums, coef: float) -> LossParts:
    # Times the denominator, since the sum of the numerators is divided by the sum of the denominators.
    weighed = load_balancing_loss(routing) * parts.den
    aux = {**parts.aux, "router_aux_loss": (jax.lax.stop_gradient(weighed), parts.den)}
    return LossParts(parts.num + coef * weighed, parts.den, aux)


def init_state(params: Params, optimizer: Optimizer, layout: Layout | None = None) -> TrainState:
    """The state before the first step, laid out; without a layout on the default device."""
    if layout is not None:
        params = layout.put(params)  # moments are then made in their places
    state = TrainState(jnp.int32(0), jnp.int32(0), params, optimizer.transform.init(params))
    # Committed, like a restored state: otherwise the two would be two programs.
    return jax.device_put(state, jax.devices()[0]) if layout is None else layout.put(state)


def loss_gradients(
    model: SplitModel,
    loss: ModelLoss,
    params: Params,
    frozen: Params,
    batch: Batch,
    accum_steps: int = 1,
    layout: Layout | None = None,
) -> tuple[LossParts, Params]:
    """Summed `LossParts` of a batch, and the gradient of num / max(den, 1).

    Args:
      batch: arrays [rows, T]; rows are cut into `accum_steps` equal microbatches, done one after the other.
      layout: where parameters and rows lie; gradients lie where their parameters do.
    """
    pin = layout.pin if layout is not None else lambda tree: tree

    def numerator(params: Params, micro: Batch) -> tuple[Float[Array, ""], LossParts]:
        parts = loss(model.merge(params, frozen), micro)
        return parts.num, parts

    value_and_grad = jax.value_and_grad(numerator, has_aux=True)
    if accum_steps == 1:
        (_, parts), grads = value_and_grad(params, batch)
    else:
        micros = {k: v.reshape(accum_steps, v.shape[0] // accum_steps, *v.shape[1:]) for k, v in batch.items()}
        if layout is not None:  # each microbatch is dealt out, not one of them to each device
            micros = {k: layout.pin_rows(v, axis=1) for k, v in micros.items()}

        def body(total, micro):
            (_, parts), grads = value_and_grad(params, micro)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (parts, pin(grads))), None

        one = {k: v[0] for k, v in micros.items()}
        parts_shape = jax.eval_shape(lambda: value_and_grad(params, one)[0][1])
        zero = (
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), parts_shape),
            pin(jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)),
        )
        (parts, grads), _ = jax.lax.scan(body, zero, micros)
    # A batch without targets has gradient 0 / 1.
    scale = 1.0 / jnp.maximum(parts.den, 1.0)
    return parts, jax.tree.map(lambda g: g.astype(jnp.float32) * scale, pin(grads))


def make_train_step(
    model: SplitModel, loss: ModelLoss, optimizer: Optimizer, *, accum_steps: int = 1, layout: Layout | None = None
) -> jax.stages.Wrapped:
    """The jitted step `(state, frozen, batch) -> (state, metrics)`. `state` is donated: its arrays are gone afterwards.

    Metrics are device scalars: loss_num and loss_den (0 in a skipped step), aux (name -> (num, den)), tokens (not
    padding), grad_norm (before clipping), update_norm, param_norm, learning_rate, skipped (0 or 1).
    """

    def step(state: TrainState, frozen: Params, batch: Batch) -> tuple[TrainState, Metrics]:
        parts, grads = loss_gradients(model, loss, state.params, frozen, batch, accum_steps, layout)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(parts.num)
        if optimizer.clip_norm is not None:
            factor = jnp.minimum(1.0, optimizer.clip_norm / jnp.maximum(grad_norm, 1e-16))
            grads = jax.tree.map(lambda g: g * factor, grads)
        updates, opt_state = optimizer.transform.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        def counted(x):
            return jnp.where(finite, x, 0.0)

        new_state = TrainState(
            step=state.step + 1,
            updates=state.updates + finite.astype(jnp.int32),
            params=keep(params, state.params),
            opt_state=keep(opt_state, state.opt_state),
        )
        if layout is not None:
            new_state = layout.pin(new_state)
        metrics = {
            "loss_num": counted(parts.num),
            "loss_den": counted(parts.den),
            "aux": jax.tree.map(counted, parts.aux),
            "tokens": jnp.sum(batch["segment_ids"] != 0),
            "grad_norm": grad_norm,
            "update_norm": counted(optax.tree.norm(updates)),
            "param_norm": optax.tree.norm(state.params),
            "learning_rate": jnp.asarray(optimizer.schedule(state.updates), jnp.float32),
            "skipped": 1 - finite.astype(jnp.int32),
        }
        return new_state, metrics

    return jax.jit(step, donate_argnums=0)


def make_eval_step(model: SplitModel, loss: ModelLoss) -> jax.stages.Wrapped:
    """The jitted `(params, frozen, batch) -> LossParts` without gradients."""
    return jax.jit(lambda params, frozen, batch: loss(model.merge(params, frozen), batch))


def parameter_count(params: Params) -> int:
    return sum(int(np.prod(p.shape)) for p in params.values())
