"""The training step: gradients of the trainable half, clipping, the optimizer. Compiled in one place."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.models.stack import Stack
from jaxllm.objectives.base import CROSS_ENTROPY, Losses, Objective
from jaxllm.optim.clip import clip_coefficient
from jaxllm.optim.curvature import Curvature
from jaxllm.step.by_layer import update_by_layer
from jaxllm.step.leaf_update import LeafUpdate, Visitor
from jaxllm.step.norms import norms, squares
from jaxllm.step.offload import in_pieces
from jaxllm.step.rounding import apply_updates
from jaxllm.step.state import SMALLEST_LOSS_SCALE, TrainState, over_replicas

Batch = Mapping[str, jax.Array]
Metrics = Mapping[str, jax.Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

Gradient = Callable[[LM, TrainState, Batch, Objective], tuple[Losses, Params]]
"""The mean losses of a batch over its trained tokens, and the gradient of the objective for the trainable half: in the
dtype of the parameters if there is one micro-batch, otherwise in at least float32. Where the state has a loss scale,
the gradient is multiplied by it."""

# The dimensions of every array of a batch: micro-batches, sequences, tokens.
BATCH_AXES = ("micro", "batch", "act_inner_length")

# What a step draws random numbers for.
DROPOUT, ROUNDING, TARGETS, LAYERS = range(4)


def make_step(
    lm: LM,
    tx: optax.GradientTransformationExtraArgs,
    schedule: optax.Schedule,
    *,
    gradient: Gradient,
    objective: Objective = CROSS_ENTROPY,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    seed: int = 0,
    stochastic_rounding: bool = False,
    curvature: Curvature | None = None,
    penalty: Callable[[Params], jax.Array] | None = None,
    by_layer: bool = False,
    scattered: bool = False,
) -> Step:
    """A step over batches of arrays `[micro-batches, sequences, T]`.

    The objective is the mean over all trained tokens of the whole batch, so that the result does not depend on how
    the batch is cut into micro-batches, nor on how `gradient` walks through them. With `max_grad_norm`, the
    gradient is scaled by min(1, max_grad_norm / (norm + 1e-6)), norm being that of all trainable parameters. With
    `max_grad_value`, its entries are clamped to ±max_grad_value before that (the norm is of the unclamped ones).
    A loss or gradient that is not finite leaves parameters, optimizer state and the schedule's step as they are. So do
    parameters whose norm is not finite: a model normalises what such weights make to 0, and its loss is finite.
    Optimizer state that lies in the host's memory is on the device while it is used, see `in_pieces`.

    seed: of what is drawn, anew for each step: what `lm.dropout` drops, a mask for each sequence, and how bfloat16
    parameters are rounded where `stochastic_rounding`.

    Where the state has a loss scale, the objective is multiplied by it before it is differentiated, and the float32
    gradient divided by it after. A gradient that is not finite then counts as an overflow of float16, and lowers the
    scale; it counts as bad only where the loss is not finite either or the scale is the smallest already.

    With `curvature`, `tx` (then `optim.sophia_g`) is given √N·ĝ as `hessian_grads` in the updates in which that is due:
    ĝ is the gradient at the same parameters, of the same N trained tokens with drawn targets, clipped by itself as the
    gradient is. One that is not finite makes the step bad.

    penalty: of the trainable parameters, added to the objective once a step; the curvature is that of the loss alone.

    by_layer: one layer is updated after the other, see `by_layer`; `tx` must then treat leaves separately, and also the
    layers of a stack, and there is no curvature. scattered: each replica has a part of the gradient and of the state.

    Metrics: `loss` (the mean cross entropy, whatever is minimised), `grad_norm` (before clipping), `learning_rate`,
    `trained_tokens`, `bad` (1 for a step that was not applied); `grad_norm/<group>` and `param_norm/<group>` (before
    the update) of the trainable half, see `norms.norms`; `objective` where it is not the loss, `z_loss` and `penalty`
    where they are parts of it; `loss_scale` (the one used) and `overflow` (1 for such a step) where there is one;
    `sophia_win_rate` with `curvature`: the share of entries that were not clipped.
    """

    def unscaled_gradient(state: TrainState, batch: Batch, objective: Objective) -> tuple[Losses, Params]:
        losses, grads = gradient(lm, state, batch, objective)
        if state.loss_scale is not None:
            grads = optax.tree.scale(1 / state.loss_scale.scale, wide(grads))
        return losses, grads

    def wide(grads: Params) -> Params:
        return jax.tree.map(lambda g: g.astype(at_least_float32(g.dtype)), grads)

    def clips_by(norm: jax.Array) -> jax.Array | None:
        return None if max_grad_norm is None else clip_coefficient(norm, max_grad_norm)

    def clipped(grads: Params, norm: jax.Array) -> Params:
        grads = wide(grads)
        if max_grad_value is not None:
            grads = optax.tree.clip(grads, -max_grad_value, max_grad_value)
        if (coefficient := clips_by(norm)) is not None:
            grads = optax.tree.scale(coefficient, grads)
        return grads

    def rounds_by(state: TrainState) -> jax.Array | None:
        return step_key(seed, state.step, ROUNDING) if stochastic_rounding else None

    def curvature_gradient(state: TrainState, batch: Batch) -> tuple[Params, jax.Array]:
        """ĝ before it is clipped, and its norm."""
        batch = with_drawn_targets(batch, step_key(seed, state.step, TARGETS))
        _, grads = unscaled_gradient(state, batch, CROSS_ENTROPY)
        # XLA does not see how the result of a condition is used, and would leave it whole on each device.
        shardings = tree.flatten(lm.shardings())

        def laid_out(path: str, g: jax.Array) -> jax.Array:
            sharding = over_replicas(shardings[path], g.shape) if scattered else shardings[path]
            return jax.lax.with_sharding_constraint(g, sharding)

        grads = tree.map_with_path(laid_out, grads)
        return grads, jnp.sqrt(sum(squares(grads).values()))

    def curvature_if_due(state: TrainState, batch: Batch) -> tuple[Params | None, jax.Array | bool]:
        """√N·ĝ in the steps in which it is due, zeros in others, and whether it is finite; None where it never is."""
        if curvature is None:
            return None, True
        # What the condition gives is kept beside the gradient, so it is scaled, and made wider, behind it.
        drawn = partial(curvature_gradient, state, batch)
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(drawn))
        grads, norm = jax.lax.cond(curvature.is_due(state.step), drawn, lambda: nothing)
        root = jnp.sqrt(jnp.sum(batch["loss_mask"])).astype(norm.dtype)
        return optax.tree.scale(root, clipped(grads, norm)), jnp.isfinite(norm)

    def updates_of(
        state: TrainState, grads: Params, hessian_grads: Params | None
    ) -> tuple[optax.Updates, optax.OptState]:
        """The updates, and the state of the optimizer after them."""
        updates, after = tx.update(grads, state.opt_state, state.params)
        if curvature is None:
            return updates, after
        due = curvature.is_due(state.step)
        _, moved = tx.update(grads, state.opt_state, state.params, hessian_grads=hessian_grads)
        return updates, jax.tree.map(lambda moved, kept: jnp.where(due, moved, kept), moved, after)

    def applied(state: TrainState, updates: optax.Updates) -> Params:
        if (key := rounds_by(state)) is None:
            return apply_updates(state.params, updates)
        return apply_updates(state.params, updates, key, jnp.asarray(lm.layer_order))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        batch = with_dropout(lm, batch, seed, state.step)
        losses, grads = unscaled_gradient(state, batch, objective)
        penalties = {}
        if penalty is not None:
            penalties["penalty"], of_penalty = jax.value_and_grad(penalty)(state.params)
            losses = losses._replace(objective=losses.objective + penalties["penalty"])
            penalties["objective"] = losses.objective
            grads = jax.tree.map(jnp.add, wide(grads), of_penalty)
        loss_scale = state.loss_scale
        param_squares = squares(state.params)
        metrics = step_metrics(losses, squares(grads), param_squares, batch, schedule(state.step), objective)
        metrics |= penalties
        norm = metrics["grad_norm"]
        hessian_grads, finite = curvature_if_due(state, batch)
        sound = jnp.isfinite(sum(param_squares.values()))
        good = jnp.isfinite(losses.objective) & jnp.isfinite(norm) & finite & sound
        overflow = jnp.zeros((), bool)
        if loss_scale is not None:
            overflow = jnp.isfinite(losses.objective) & sound & ~good & (loss_scale.scale > SMALLEST_LOSS_SCALE)
            metrics |= {"loss_scale": loss_scale.scale, "overflow": overflow.astype(jnp.int32)}
            loss_scale = loss_scale.after(good, overflow)
        metrics["bad"] = (~good & ~overflow).astype(jnp.int32)

        def updated(opt_state: optax.OptState) -> tuple[optax.OptState, tuple[Params, Metrics]]:
            if by_layer:
                # Writes in place come after the last reading of the old parameters, or XLA copies them.
                begins, _ = jax.lax.optimization_barrier((good, metrics))
                visitor = Visitor(LeafUpdate(lm, tx), begins, clips_by(norm), max_grad_value, rounds_by(state))
                params, after = update_by_layer(visitor, lm, state.params, grads, opt_state, scattered=scattered)
                return after, (params, {})
            before = state._replace(opt_state=opt_state)
            updates, after = updates_of(before, clipped(grads, norm), hessian_grads)
            new, old = (applied(before, updates), after), (before.params, opt_state)
            params, after = jax.tree.map(lambda new, old: jnp.where(good, new, old), new, old)
            if curvature is None:
                return after, (params, {})
            return after, (params, {"sophia_win_rate": curvature.win_rate(after, params, lm.padded)})

        opt_state, (params, of_update) = in_pieces(updated, state.opt_state)
        metrics |= of_update
        return TrainState(state.step + good, params, state.frozen, opt_state, loss_scale), metrics

    return step


def accumulated(stack: Stack) -> Gradient:
    """The gradients of one micro-batch after the other, by walks of `stack`, summed in at least float32."""

    def gradient(lm: LM, state: TrainState, batch: Batch, objective: Objective) -> tuple[Losses, Params]:
        means = mean_losses(lm, state, batch, objective)
        return over_micro_batches(lambda params, micro: means(params, micro, stack), state.params, batch)

    return gradient


def mean_losses(
    lm: LM, state: TrainState, batch: Batch, objective: Objective
) -> Callable[[Params, Batch, Stack], tuple[jax.Array, Losses]]:
    """What a micro-batch of `batch` adds to the mean losses of that, by a walk, at any trainable parameters; and in
    front of it what is differentiated: the objective, multiplied by the state's loss scale."""
    trained = trained_tokens(batch)
    factor = 1 if state.loss_scale is None else state.loss_scale.scale

    def of_micro(params: Params, micro: Batch, stack: Stack) -> tuple[jax.Array, Losses]:
        sums = lm.losses(tree.combine(params, state.frozen), micro, stack, objective)
        means = jax.tree.map(lambda total: total / trained, sums)
        return means.objective * factor, means

    return of_micro


def over_micro_batches(
    loss: Callable[[Any, Batch], tuple[jax.Array, Losses]], params: Any, batch: Batch
) -> tuple[Losses, Any]:
    """The losses of one micro-batch after the other, and the gradients for `params` of what `loss` has in front of
    them; of several, summed in at least float32."""

    def of_micro(micro: Batch) -> tuple[Losses, Any]:
        (_, means), grads = jax.value_and_grad(loss, has_aux=True)(params, micro)
        return means, grads

    def add(total: tuple[Losses, Any], micro: Batch):
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), total, of_micro(micro)), None

    first = {name: array[0] for name, array in batch.items()}
    if batch["tokens"].shape[0] == 1:
        return of_micro(first)
    shapes = jax.eval_shape(of_micro, first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, at_least_float32(a.dtype)), shapes)
    return jax.lax.scan(add, zeros, dict(batch))[0]


def trained_tokens(batch: Batch) -> jax.Array:
    """What the sums of losses are divided by: the trained tokens of all micro-batches, or 1 where there are none."""
    return jnp.maximum(jnp.sum(batch["loss_mask"]), 1)


def step_key(seed: int, step: jax.Array, purpose: int) -> jax.Array:
    """The key of what a step draws for a purpose."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def with_dropout(lm: LM, batch: Batch, seed: int, step: jax.Array) -> Batch:
    """`batch` with a key for each sequence, if the model drops anything."""
    if not (lm.dropout or lm.adapter_dropout):
        return batch
    return {**batch, "dropout_keys": jax.random.split(step_key(seed, step, DROPOUT), batch["tokens"].shape[:2])}


def with_drawn_targets(batch: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """The batch with a key in place of each target, by which it is drawn from the model (see `LM.losses`).

    A key follows from `key` and the place in the whole batch: the draw depends on neither mesh nor micro-batches.
    """
    shape = batch["targets"].shape
    return {**batch, "targets": jax.random.split(key, shape)}


def step_metrics(
    losses: Losses,
    grad_squares: Mapping[str, jax.Array],
    param_squares: Mapping[str, jax.Array],
    batch: Batch,
    learning_rate: Any,
    objective: Objective,
) -> dict[str, jax.Array]:
    """The metrics of `make_step` that every step has; squares: `norms.squares` of gradients and parameters."""
    metrics = {
        "loss": losses.cross_entropy,
        "learning_rate": jnp.asarray(learning_rate),
        "trained_tokens": jnp.sum(batch["loss_mask"]),
        **norms("grad_norm", grad_squares),
        **{name: norm for name, norm in norms("param_norm", param_squares).items() if "/" in name},
    }
    if objective != CROSS_ENTROPY:
        metrics["objective"] = losses.objective
    if objective.z_loss:
        metrics["z_loss"] = losses.z_loss
    return metrics


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step, what compiling took in seconds, and the bytes that a device holds for it.

    argument_bytes: state and batch. temp_bytes: what lives within the step. peak_bytes: the most at a time.
    in_place_bytes: of the state, what the new one is written over. host_bytes: what is in the host's memory, between
    steps or within one; on a CPU that is the device's.
    """

    run: Step
    compile_s: float
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    in_place_bytes: int
    host_bytes: int


def batch_shapes(shape: tuple[int, int, int], layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch of `[micro-batches, sequences, T]`, abstractly."""
    check_length(shape[2], layout)
    layout.spec(BATCH_AXES, shape, "batch")
    names = {"tokens": jnp.int32, "targets": jnp.int32, "positions": jnp.int32, "segments": jnp.int32}
    sharding = layout.sharding(*BATCH_AXES)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in {**names, "loss_mask": jnp.float32}.items()
    }


def check_length(length: int, layout: Layout) -> None:
    """Raises UserError if rows of `length` tokens do not divide over the devices that share them."""
    ways = layout.size("act_length")
    if length % ways:
        axes = " × ".join(f"{axis} {layout.mesh.shape[axis]}" for axis in layout.rules["act_length"])
        nearest = " or ".join(str(size) for size in (length // ways * ways, -(-length // ways) * ways) if size)
        raise UserError(
            f"rows of {length} tokens do not divide over the {ways} devices of the mesh ({axes}) that share a "
            f"sequence; set data.seq_len so that they do: to {nearest}, or with data.packing grouped to a multiple of "
            f"{8 * ways}"
        )


def compile_step(
    step: Step, state: Any, batch: Any, layout: Layout, options: Mapping[str, Any] | None = None
) -> CompiledStep:
    """Compiles `step` for abstract arguments with shardings. The state's buffers are reused for the new state.

    options: the compiler's, for this program alone.
    """
    start = time.monotonic()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
    compiled = jitted.lower(state, batch).compile(compiler_options=dict(options or {}))
    memory: Any = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return CompiledStep(
        compiled,
        time.monotonic() - start,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        peak,
        memory.alias_size_in_bytes + memory.host_alias_size_in_bytes,
        memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    )


def compile_steps(
    step: Step, state: Any, batches: Sequence[Any], layout: Layout, options: Mapping[str, Any] | None = None
) -> CompiledStep:
    """Compiles `step` for each of several shapes of a batch; `run` takes the program of its batch's shape.

    The bytes are those of the largest program, and the seconds those of all.
    """
    compiled = {batch["tokens"].shape: compile_step(step, state, batch, layout, options) for batch in batches}
    largest = max(compiled.values(), key=lambda one: one.peak_bytes)
    if len(compiled) == 1:
        return largest

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return compiled[batch["tokens"].shape].run(state, batch)

    return replace(largest, run=run, compile_s=sum(one.compile_s for one in compiled.values()))
