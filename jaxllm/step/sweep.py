"""The backward sweep: from the last layer to the first, a visitor sees each layer as soon as its gradient is there.

With a visitor that updates the layer, one layer's gradient exists at a time instead of the whole stack's (Lv et al.,
"Full Parameter Fine-tuning for Large Language Models with Limited Resources", arXiv 2306.09782, do so by hooks). Two
things make XLA work in place: the stacked parameters are carried by the loop (as the outputs of a scan they would be a
second copy), and an `optimization_barrier` separates a layer's update from the walk to the layer below.

Parameters are flat here, `{path: array}`: an update takes the leaves of a layer one by one.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.host_memory import to_device, to_host, waits_on_host
from jaxllm.core.tree import Leaves
from jaxllm.step.norms import squares

Visit = Callable[[Leaves, Leaves, Mapping[str, Any], jax.Array], tuple[Leaves, Mapping[str, Any]]]
"""`(parameters, gradients, state, index) -> (parameters, state)` of one layer, each array with a leading axis of 1;
index `[1]` int32 says which it is. It must treat leaves separately: it may be called with only some."""

_barrier = jax.lax.optimization_barrier


class Layers(Protocol):
    """What a sweep needs of a model: one layer over a whole batch. trainable, frozen: the two halves of its parameters,
    kept: what its forward pass left for the backward pass."""

    def gradients(self, trainable: Leaves, frozen: Leaves, kept: Any, dy: jax.Array) -> tuple[Leaves, jax.Array]:
        """The gradients of the trainable half, summed over the batch, and the gradient of the layer's input."""
        ...

    def input_gradient(self, trainable: Leaves, frozen: Leaves, kept: Any, dy: jax.Array) -> jax.Array:
        """The gradient of the layer's input alone."""
        ...


class Visitor(NamedTuple):
    """What is made of the gradients of layers.

    carry: what it begins with. trainable: the layers, of its carry. at_layer: `(carry, gradients, dx, place, slot) ->
    (carry, dx)`; slot: the number of the layer among the rows that are visited.
    """

    carry: Any
    trainable: Callable[[Any], Leaves]
    at_layer: Callable[..., tuple[Any, jax.Array]]


def sweep(
    model: Layers,
    frozen: Leaves,
    kept: Any,
    dx: jax.Array,
    visitor: Visitor,
    *,
    rows: jax.Array | None = None,
    to_bottom: bool = True,
    chunks: int = 1,
    axis: int = 0,
) -> tuple[Any, jax.Array]:
    """Walks down a stack of layers: `(the visitor's carry, the gradient of the first layer's input)`.

    Args:
        frozen: the half of the stacked parameters that does not train, `[L, …]`.
        kept: what each layer kept, stacked.
        dx: the gradient of the last layer's output; with `chunks`, of the last layer of each of so many equal parts of
            the stack, which are walked by themselves, `[chunks, …]`.
        rows: `[n]` int32, distinct layers in rising order, which alone are visited; None = all. They may be traced, so
            that others need no other program. The layers between them are walked by an inner loop that has no gradient
            of weights: a `cond` in one loop would skip it too, but hold each branch's operands and results apart.
        to_bottom: whether the walk ends at the first layer; if not, it ends at the lowest of `rows`.
        axis: along which layers and chunks are stacked: 1 behind that of the stages, which `model` then computes for.
    """
    if rows is not None:
        return _walk_rows(model, frozen, kept, dx, visitor, rows, to_bottom=to_bottom)
    depth = jax.tree.leaves(frozen)[0].shape[axis]
    of_chunk, tops = depth // chunks, dx

    def body(k: jax.Array, state: Any) -> Any:
        carry, dx = state
        i = depth - 1 - k
        if chunks > 1:
            dx = jnp.where((i + 1) % of_chunk == 0, take(tops, i // of_chunk, axis), dx)
        trainable, others, own = take((visitor.trainable(carry), frozen, kept), i, axis)
        grads, dx = model.gradients(trainable, others, own, dx)
        return visitor.at_layer(carry, grads, dx, i, i)

    return jax.lax.fori_loop(0, depth, body, (visitor.carry, take(tops, chunks - 1, axis) if chunks > 1 else dx))


def _walk_rows(
    model: Layers, frozen: Leaves, kept: Any, dx: jax.Array, visitor: Visitor, rows: jax.Array, *, to_bottom: bool
) -> tuple[Any, jax.Array]:
    def skip(trainable: Leaves, i: jax.Array, low: jax.Array, dx: jax.Array) -> jax.Array:
        """Past the layers i, i − 1, …, low + 1."""

        def body(carry: Any) -> Any:
            i, dx = carry
            return i - 1, model.input_gradient(take(trainable, i), take(frozen, i), take(kept, i), dx)

        return jax.lax.while_loop(lambda carry: carry[0] > low, body, (i, dx))[1]

    def body(k: jax.Array, state: Any) -> Any:
        carry, i, dx = state
        slot = rows.shape[0] - 1 - k
        row, trainable = rows[slot], visitor.trainable(carry)
        # The layer is computed again only once its output's gradient is there, or its activations would wait for it.
        of_row, dx = _barrier((take(kept, row), skip(trainable, i, row, dx)))
        grads, dx = model.gradients(take(trainable, row), take(frozen, row), of_row, dx)
        carry, dx = visitor.at_layer(carry, grads, dx, row, slot)
        return carry, row - 1, dx

    top = jnp.asarray(jax.tree.leaves(frozen)[0].shape[0] - 1, rows.dtype)
    carry, i, dx = jax.lax.fori_loop(0, rows.shape[0], body, (visitor.carry, top, dx))
    return carry, skip(visitor.trainable(carry), i, jnp.asarray(-1, rows.dtype), dx) if to_bottom else dx


# Visitors


def squared(trainable: Leaves) -> Visitor:
    """Sums the squares of the gradients, by path, and keeps nothing else."""

    def at_layer(total: Any, grads: Leaves, dx: jax.Array, i: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array]:
        return _add_squares(total, grads), dx

    return Visitor(_zero_squares(trainable), lambda _: trainable, at_layer)


def collected(model: Layers, trainable: Leaves, frozen: Leaves, kept: Any, dx: jax.Array, rows: jax.Array) -> Visitor:
    """Keeps the gradients of the rows, `{path: [n, …]}`. frozen, kept, dx: of the sweep, for their shapes."""

    def add(total: Leaves, grads: Leaves, dx: jax.Array, i: jax.Array, slot: jax.Array) -> tuple[Leaves, jax.Array]:
        grads, dx = _barrier((grads, dx))
        return put_row(total, jax.tree.map(lambda g: g[None], grads), slot), dx

    of_layer = jax.eval_shape(lambda *one: model.gradients(*one)[0], *take((trainable, frozen, kept), rows[0]), dx)
    zeros = {name: jnp.zeros((rows.shape[0], *g.shape), g.dtype) for name, g in of_layer.items()}
    return Visitor(zeros, lambda _: trainable, add)


def updated(
    trainable: Leaves,
    state: Mapping[str, Any],
    visit: Visit,
    index: jax.Array,
    slots: jax.Array | None = None,
    axis: int = 0,
) -> Visitor:
    """Updates each layer by `visit` in the place of the old one. Its carry ends as `(parameters, state, squares)`.

    state: by path, a tree of the visitor's arrays for each trainable leaf, `[L, …]`, or with `slots` `[n]` int32 the
    one at `slots[k]` for the k-th row. Arrays of the state that lie in the host's memory are brought row by row. index:
    `[L]`, which layer each is. axis: see `sweep`; `visit` then sees the stages too.
    """
    # A rule without state, or with little, writes a layer in one fusion. One with moments would make those of all
    # leaves before it writes any: its leaves are chained, each stored before the next one's update begins.
    chained = _row_bytes(state) >= _row_bytes(trainable)
    parts = [[name] for name in trainable] if chained else [list(trainable)]

    def at_layer(carry: Any, grads: Leaves, dx: jax.Array, i: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array]:
        trainable, state, total = carry
        j = slot if slots is None else slots[slot]
        total = _add_squares(total, grads)
        for names in parts:
            g = {name: jnp.expand_dims(grads[name], axis) for name in names}
            g, dx = _barrier((g, dx)) if chained else (g, dx)
            params, rows = ({name: of[name] for name in names} for of in (trainable, state))
            new, new_state = visit(take_row(params, i, axis), g, take_row(rows, j, axis), take_row(index, i, axis))
            new, new_state, dx = _barrier((new, new_state, dx))
            trainable = {**trainable, **put_row(params, new, i, axis)}
            state = {**state, **put_row(rows, new_state, j, axis)}
            if chained:
                trainable, state, dx = _barrier((trainable, state, dx))
        return (trainable, state, total), dx

    carry = (dict(trainable), dict(state), _zero_squares(trainable))
    return Visitor(carry, lambda carry: carry[0], at_layer)


def _zero_squares(trainable: Leaves) -> dict[str, jax.Array]:
    return {name: jnp.zeros((), at_least_float32(leaf.dtype)) for name, leaf in trainable.items()}


def _add_squares(total: Mapping[str, jax.Array], grads: Leaves) -> dict[str, jax.Array]:
    of_layer = squares(grads)
    return {name: total[name] + of_layer[name] for name in total}


# Rows of stacks


def take(stacked: Any, i: jax.Array | int, axis: int = 0) -> Any:
    """Layer `i` of a stack."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, axis, keepdims=False), stacked)


def take_row(stacked: Any, i: jax.Array, axis: int = 0) -> Any:
    """Layer `i` of a stack, as a stack of one on the device."""

    def row(a: jax.Array) -> jax.Array:
        row = jax.lax.dynamic_slice_in_dim(a, i, 1, axis)
        return to_device(row) if waits_on_host(a) else row

    return jax.tree.map(row, stacked)


def put_row(stacked: Any, row: Any, i: jax.Array, axis: int = 0) -> Any:
    """The stack with `row`, a stack of one, in place of layer `i`."""

    def put(a: jax.Array, b: jax.Array) -> jax.Array:
        b = b.astype(a.dtype)
        return jax.lax.dynamic_update_slice_in_dim(a, to_host(b) if waits_on_host(a) else b, i, axis)

    return jax.tree.map(put, stacked, row)


def _row_bytes(stacked: Any) -> int:
    return sum(a.size // a.shape[0] * a.dtype.itemsize for a in jax.tree.leaves(stacked))
