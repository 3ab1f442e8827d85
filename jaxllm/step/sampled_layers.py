"""The training step of LISA (Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
Fine-Tuning", arXiv 2403.17919): a few layers train at a time, drawn anew every so many steps.

What is frozen meanwhile has no gradient and no optimizer state. Which layers train is data of the compiled step, so
drawing others compiles nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.objectives.base import CROSS_ENTROPY, Losses, Objective
from jaxllm.optim.clip import clip_coefficient
from jaxllm.peft.layer_sampling import LisaPolicy
from jaxllm.step.batch import LAYERS, ROUNDING, Batch, step_key, with_dropout
from jaxllm.step.layerwise import INDEX, Layerwise, in_embedding, layers_and_rest
from jaxllm.step.leaf_update import Leaves
from jaxllm.step.norms import squares
from jaxllm.step.pipeline_1f1b import pass_through
from jaxllm.step.rounding import apply_updates
from jaxllm.step.state import Metrics, Step, TrainState, laid_like
from jaxllm.step.sweep import layer_inputs, rows_sweep
from jaxllm.step.update import step_metrics

Transform = Callable[[optax.Schedule], optax.GradientTransformationExtraArgs]
"""An optimizer, for a learning rate."""


@dataclass(frozen=True)
class Draws:
    """Which layers train when. active: how many at a time. interval: steps after which others are drawn. seed: of the
    draws. state: what becomes of the optimizer's state then, see `peft.lisa.Lisa.state`.
    """

    active: int
    interval: int
    seed: int
    state: LisaPolicy = "reset_body"

    def rows(self, step: jax.Array, layers: int) -> jax.Array:
        """The layers that train in a step, `[active]` int32 in rising order; they follow from the interval alone."""
        key = step_key(self.seed, step // self.interval, LAYERS)
        return jnp.sort(jax.random.permutation(key, layers)[: self.active])


class LisaState(NamedTuple):
    """The optimizer's state. rest: of what always trains. layers: of single layers, each leaf `[n, …]`: one for each of
    the active ones, or for every layer where they are kept."""

    rest: Any
    layers: Any


@dataclass(frozen=True)
class LisaOptimizer:
    """An optimizer of whatever trains at a time. A layer has a state of its own, with its own count of steps."""

    lm: LM
    transform: Transform
    draws: Draws

    def init(self, params: Params) -> LisaState:
        """The state before the first step for the trainable `params`."""
        layers, rest = layers_and_rest(tree.flatten(params))
        count = self.lm.config.num_hidden_layers if self.draws.state == "keep" else self.draws.active
        tx = self.transform(lambda _: 0.0)
        return LisaState(tx.init(self.nested(rest)), self._fresh(tx, {name: a[:count] for name, a in layers.items()}))

    def shardings(self, params: Params, layout: Layout) -> LisaState:
        """Where the state for abstract `params` lies: see `laid_like`; a layer's as in a stack of one."""
        tx = self.transform(lambda _: 0.0)
        layers, rest = (self.nested(leaves) for leaves in layers_and_rest(tree.flatten(params)))
        shapes = jax.eval_shape(self.init, params)

        def place(shape: Any, param: Any, leading: bool) -> Any:
            if not leading:
                return laid_like(shape.shape, param)
            sharding = laid_like(shape.shape[1:], _layer_of(param))
            layers = param.sharding.spec[0] if self.draws.state == "keep" else None
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(layers, *sharding.spec))

        def of(state: Any, owners: Any, leading: bool) -> Any:
            return optax.tree.map_params(
                tx,
                lambda shape, param: place(shape, param, leading),
                state,
                owners,
                transform_non_params=lambda _: layout.replicated,
            )

        return LisaState(of(shapes.rest, rest, False), of(shapes.layers, layers, True))

    def update(
        self, grads: Leaves, state: Any, params: Leaves, step: jax.Array, rate: Any, rows: jax.Array
    ) -> tuple[Leaves, LisaState]:
        """`(updates, state)` for the gradients of the rows `[active, …]` of the layers, and of what always trains."""
        tx = self.transform(lambda _: rate)
        layers, rest = layers_and_rest(params)
        layer_grads, rest_grads = layers_and_rest(grads)
        old_rest, old_layers = self.begun(state, params, step)
        kept = old_layers
        if self.draws.state == "keep":
            old_layers = jax.tree.map(lambda a: a[rows], old_layers)
        updates, new_rest = tx.update(self.nested(rest_grads), old_rest, self.nested(rest))

        def of_layer(grads: Params, state: Any, params: Params) -> Any:
            updates, state = tx.update(_stacked(grads), state, _stacked(params))
            return jax.tree.map(lambda a: a[0], updates), state

        layer_updates, new_layers = jax.vmap(of_layer)(self.nested(layer_grads), old_layers, self.nested(layers))
        if self.draws.state == "keep":
            new_layers = jax.tree.map(lambda all, new: all.at[rows].set(new), kept, new_layers)
        return {**tree.flatten(updates), **tree.flatten(layer_updates)}, LisaState(new_rest, new_layers)

    def begun(self, state: Any, params: Leaves, step: jax.Array) -> LisaState:
        """`state` before a step: where an interval begins, without what is reset. params: of what trains."""
        if self.draws.state == "keep":
            return state
        tx, begins = self.transform(lambda _: 0.0), step % self.draws.interval == 0
        layers, rest = layers_and_rest(params)
        of_layers = _where(begins, self._fresh(tx, layers), state.layers)
        if self.draws.state == "reset_body":
            return LisaState(state.rest, of_layers)
        return LisaState(_where(begins, tx.init(self.nested(rest)), state.rest), of_layers)

    def nested(self, leaves: Leaves) -> Params:
        """The parameter tree that has `leaves`, and None elsewhere."""
        return jax.tree.map(leaves.get, tree.paths(self.lm.abstract()))

    def _fresh(self, tx: optax.GradientTransformationExtraArgs, layers: Leaves) -> Any:
        return jax.vmap(lambda params: tx.init(_stacked(params)))(self.nested(layers))


def _stacked(layer: Params) -> Params:
    """One layer as a stack of one, which is what an optimizer knows."""
    return jax.tree.map(lambda a: a[None], layer)


def _layer_of(stack: Any) -> jax.ShapeDtypeStruct:
    """One layer of a stack `[L, …]`, as a stack of one."""
    spec = jax.sharding.PartitionSpec(None, *stack.sharding.spec[1:])
    sharding = jax.sharding.NamedSharding(stack.sharding.mesh, spec)
    return jax.ShapeDtypeStruct((1, *stack.shape[1:]), stack.dtype, sharding=sharding)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old), new, old)


def make_lisa_step(
    optimizer: LisaOptimizer,
    schedule: optax.Schedule,
    *,
    objective: Objective = CROSS_ENTROPY,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    seed: int = 0,
    stochastic_rounding: bool = False,
) -> Step:
    """A step with the arguments, results and metrics of `make_step`, in which some layers train.

    The forward pass keeps each layer's input; the backward pass computes each layer again, and takes the gradient of
    the weights of those that train. `state.params` has all layers; the norms are of those that train. With a pipeline
    any number of these may lie in a stage: all have room for the gradients and the optimizer state of all that train.
    """
    lm, draws = optimizer.lm, optimizer.draws

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        layers, rest = layers_and_rest(tree.flatten(state.params))
        frozen_layers, frozen_rest = layers_and_rest(tree.flatten(state.frozen))
        frozen_layers[INDEX] = jnp.arange(lm.config.num_hidden_layers)
        rows = draws.rows(state.step, lm.config.num_hidden_layers)
        drawn = dict(with_dropout(lm, batch, seed, state.step))
        model = Layerwise(lm, optimizer.nested, {**frozen_rest, **rest}, rest.keys(), drawn, objective)

        if lm.layout.stages > 1:
            passed = pass_through(lm, state.params, state.frozen, model.batch, objective, rows=rows)
            # Each of the rows has a gradient in the stage that it lies in, and zeros in the others.
            of_rows = jax.tree.map(lambda g: jnp.sum(g, 0), passed.grads["layers"])
            losses, grads = passed.losses, tree.flatten({**passed.grads, "layers": of_rows})
        else:
            losses, grads = _gradients(model, layers, frozen_layers, rows)
        grads = {name: g.astype(at_least_float32(g.dtype)) for name, g in grads.items()}
        params = {**rest, **{name: a[rows] for name, a in layers.items()}}

        param_squares = squares(params)
        metrics = step_metrics(losses, squares(grads), param_squares, batch, schedule(state.step), objective)
        norm = metrics["grad_norm"]
        good = jnp.isfinite(losses.objective) & jnp.isfinite(norm)
        # The update does not wait for the norm of the parameters: the old embedding and head would be kept for it.
        sound = jnp.isfinite(sum(param_squares.values()))
        metrics["bad"] = (~(good & sound)).astype(jnp.int32)
        if max_grad_value is not None:
            grads = optax.tree.clip(grads, -max_grad_value, max_grad_value)
        if max_grad_norm is not None:
            grads = optax.tree.scale(clip_coefficient(norm, max_grad_norm), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, params, state.step, schedule(state.step), rows)
        rounding = step_key(seed, state.step, ROUNDING) if stochastic_rounding else None
        new = tree.flatten(apply_updates(optimizer.nested(params), optimizer.nested(updates), rounding, rows))
        params, opt_state = _where(good, (new, opt_state), (params, state.opt_state))
        of_rows, rest = layers_and_rest(params)
        layers = {name: a.at[rows].set(of_rows[name]) for name, a in layers.items()}
        return TrainState(state.step + good, optimizer.nested({**rest, **layers}), state.frozen, opt_state), metrics

    return step


def _gradients(model: Layerwise, layers: Leaves, frozen: Leaves, rows: jax.Array) -> tuple[Losses, Leaves]:
    """The mean losses, and the gradients of what always trains and of `rows` of the layers, `[n, …]`."""
    inputs, output = layer_inputs(model.block, {**frozen, **layers}, model.embed(), model.batch)
    (losses, of_head), dx = model.head(output)
    to_bottom = any(in_embedding(name) for name in model.trainable)
    grads, dx = rows_sweep(model.block, layers, frozen, inputs, dx, model.batch, rows, to_bottom=to_bottom)
    return losses, {**of_head, **model.embed_gradients(dx, of_head), **grads}
