"""The backward sweep: from the last layer to the first, each layer is updated as soon as its gradient is there.

The gradient of one layer exists at a time, instead of that of the whole stack (Lv et al., "Full Parameter Fine-tuning
for Large Language Models with Limited Resources", arXiv 2306.09782, do so by hooks). Two things make XLA work in place:
the stacked parameters are carried by the loop (as the outputs of a scan they would be a second copy), and an
`optimization_barrier` stands between a layer's update and the walk to the layer below.

Parameters are flat here, `{path: array}`: an update takes the leaves of a layer one by one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.dtypes import at_least_float32
from jaxllm.step.norms import squares

Leaves = Mapping[str, jax.Array]
"""`{path: array}`, of one layer or, with a leading axis of L, of a stack of them."""

Block = Callable[[Leaves, jax.Array, Any], jax.Array]
"""`(layer, x, micro) -> x`: one layer on one micro-batch, whose own data (positions, segments, …) is `micro`."""

Visit = Callable[[Leaves, Leaves, Mapping[str, Any], jax.Array], tuple[Leaves, Mapping[str, Any]]]
"""`(parameters, gradients, state, index) -> (parameters, state)` of one layer, each array with a leading axis of 1;
index `[1]` int32 says which it is. It must treat leaves separately: it may be called with some of them alone."""

_barrier = jax.lax.optimization_barrier


def layer_inputs(block: Block, layers: Leaves, x: jax.Array, micro: Any) -> tuple[jax.Array, jax.Array]:
    """The forward walk for x `[M, B, T, D]`, M micro-batches: `(what each layer is given [L, M, B, T, D], the output)`.

    All micro-batches pass a layer before the next one is touched, so that a sharded layer is gathered once.
    """

    def body(x: jax.Array, layer: Leaves) -> tuple[jax.Array, jax.Array]:
        return _map_micro(lambda x, micro: block(layer, x, micro), x, micro), x

    output, inputs = jax.lax.scan(body, x, dict(layers))
    return inputs, output


def layer_sweep(
    block: Block,
    trainable: Leaves,
    frozen: Leaves,
    inputs: jax.Array,
    dx: jax.Array,
    micro: Any,
    *,
    visit: Visit,
    state: Mapping[str, Any],
) -> tuple[Leaves, Mapping[str, Any], jax.Array, Mapping[str, jax.Array]]:
    """Gives each layer's parameters, gradients and state to `visit`, from the last layer to the first.

    Args:
        trainable, frozen: the two halves of the stacked parameters, `[L, …]` each; `block` gets both.
        inputs: what each layer was given, `[L, M, B, T, D]`.
        dx: the gradient of the last layer's output, `[M, B, T, D]`.
        micro: the micro-batches' own data, a tree of arrays `[M, …]`.
        state: by path, a tree of the visitor's arrays `[L, …]` for each trainable leaf.

    Returns:
        the visited parameters and state; the gradient of the first layer's input; by path, the sum of the squares of
        a gradient over all layers. A gradient is summed over the micro-batches, in at least float32 if there are more
        than one.
    """
    visited = _visitor(visit, trainable, state)

    def body(k: jax.Array, carry: Any) -> Any:
        trainable, state, dx, total = carry
        i = inputs.shape[0] - 1 - k
        grads, dx = _layer_gradients(block, take(trainable, i), take(frozen, i), inputs[i], dx, micro)
        total = _add_squares(total, grads)
        return *visited(trainable, state, grads, dx, i, i), total

    carry = (dict(trainable), dict(state), dx, _zero_squares(trainable))
    return jax.lax.fori_loop(0, inputs.shape[0], body, carry)


def _visitor(visit: Visit, trainable: Leaves, state: Mapping[str, Any]) -> Callable[..., tuple[Any, Any, Any]]:
    """`(parameters, state, gradients, dx, i, j) -> (parameters, state, dx)`: layer i, whose state is row j, visited."""
    # A rule without state, or with little, writes a layer in one fusion. One with moments would make those of all
    # leaves before it writes any: its leaves are chained, each stored before the next one's update begins.
    chained = _row_bytes(state) >= _row_bytes(trainable)
    parts = [[name] for name in trainable] if chained else [list(trainable)]

    def visited(
        trainable: Leaves, state: Mapping[str, Any], grads: Leaves, dx: jax.Array, i: jax.Array, j: jax.Array
    ) -> tuple[Any, Any, Any]:
        for names in parts:
            g = {name: grads[name][None] for name in names}
            g, dx = _barrier((g, dx)) if chained else (g, dx)
            params, slots = ({name: of[name] for name in names} for of in (trainable, state))
            new, new_state = visit(take_row(params, i), g, take_row(slots, j), i[None])
            new, new_state, dx = _barrier((new, new_state, dx))
            trainable = {**trainable, **put_row(params, new, i)}
            state = {**state, **put_row(slots, new_state, j)}
            if chained:
                trainable, state, dx = _barrier((trainable, state, dx))
        return trainable, state, dx

    return visited


def squares_sweep(
    block: Block, trainable: Leaves, frozen: Leaves, inputs: jax.Array, dx: jax.Array, micro: Any
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The walk of `layer_sweep` without updates: `(gradient of the first layer's input, squares)`."""

    def body(k: jax.Array, carry: Any) -> Any:
        dx, total = carry
        i = inputs.shape[0] - 1 - k
        grads, dx = _layer_gradients(block, take(trainable, i), take(frozen, i), inputs[i], dx, micro)
        return dx, _add_squares(total, grads)

    return jax.lax.fori_loop(0, inputs.shape[0], body, (dx, _zero_squares(trainable)))


def rows_sweep(
    block: Block,
    trainable: Leaves,
    frozen: Leaves,
    inputs: jax.Array,
    dx: jax.Array,
    micro: Any,
    rows: jax.Array,
    *,
    to_bottom: bool,
) -> tuple[Leaves, jax.Array]:
    """The walk down with gradients of some layers alone: `({path: gradients [n, …]}, that of the first layer's input)`.

    rows: `[n]` int32, distinct layers in rising order; they may be traced, so that others need no other program. The
    layers between them are walked by an inner loop that has no gradient of weights: a `cond` in one loop would skip
    it too, but hold each branch's operands and results apart.
    to_bottom: whether the walk goes on below the lowest of them; if not, the second result is of its input.
    """

    def add(total: Leaves, grads: Leaves, dx: jax.Array, row: jax.Array, slot: jax.Array) -> tuple[Leaves, jax.Array]:
        grads, dx = _barrier((grads, dx))
        return put_row(total, jax.tree.map(lambda g: g[None], grads), slot), dx

    of_layer = jax.eval_shape(
        lambda dx: _layer_gradients(block, take(trainable, rows[0]), take(frozen, rows[0]), inputs[0], dx, micro)[0], dx
    )
    zeros = {name: jnp.zeros((rows.shape[0], *g.shape), g.dtype) for name, g in of_layer.items()}
    walk = (block, lambda _: trainable, frozen, inputs, dx, micro, rows)
    return _walk_rows(*walk, zeros, add, to_bottom=to_bottom)


def rows_squares(
    block: Block,
    trainable: Leaves,
    frozen: Leaves,
    inputs: jax.Array,
    dx: jax.Array,
    micro: Any,
    rows: jax.Array,
    *,
    to_bottom: bool,
) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """The walk of `rows_sweep`, of which the squares are kept: `(gradient of the first layer's input, squares)`."""

    def add(total: Any, grads: Leaves, dx: jax.Array, row: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array]:
        return _add_squares(total, grads), dx

    walk = (block, lambda _: trainable, frozen, inputs, dx, micro, rows)
    total, dx = _walk_rows(*walk, _zero_squares(trainable), add, to_bottom=to_bottom)
    return dx, total


def visited_rows_sweep(
    block: Block,
    trainable: Leaves,
    frozen: Leaves,
    inputs: jax.Array,
    dx: jax.Array,
    micro: Any,
    rows: jax.Array,
    *,
    visit: Visit,
    state: Mapping[str, Any],
    slots: jax.Array,
    to_bottom: bool,
) -> tuple[Leaves, Mapping[str, Any], jax.Array, Mapping[str, jax.Array]]:
    """`layer_sweep` that visits some layers alone. rows, to_bottom: see `rows_sweep`. slots: `[n]` int32, which row of
    the state each of them has."""
    visited = _visitor(visit, trainable, state)

    def update(carry: Any, grads: Leaves, dx: jax.Array, row: jax.Array, slot: jax.Array) -> tuple[Any, jax.Array]:
        trainable, state, total = carry
        trainable, state, dx = visited(trainable, state, grads, dx, row, slots[slot])
        return (trainable, state, _add_squares(total, grads)), dx

    carry = (dict(trainable), dict(state), _zero_squares(trainable))
    walk = (block, lambda carry: carry[0], frozen, inputs, dx, micro, rows)
    (new, state, total), dx = _walk_rows(*walk, carry, update, to_bottom=to_bottom)
    return new, state, dx, total


def _walk_rows(
    block: Block,
    trainable_of: Callable[[Any], Leaves],
    frozen: Leaves,
    inputs: jax.Array,
    dx: jax.Array,
    micro: Any,
    rows: jax.Array,
    carry: Any,
    at_row: Callable[..., tuple[Any, jax.Array]],
    *,
    to_bottom: bool,
) -> tuple[Any, jax.Array]:
    """The walk of `rows_sweep`: `(carry, dx)` after `at_row(carry, gradients, dx, row, slot) -> (carry, dx)` for each
    row. trainable_of: the layers, of the carry.
    """

    def skip(trainable: Leaves, i: jax.Array, low: jax.Array, dx: jax.Array) -> jax.Array:
        """Past the layers i, i − 1, …, low + 1."""

        def body(carry: Any) -> Any:
            i, dx = carry
            return i - 1, _input_gradient(block, {**take(frozen, i), **take(trainable, i)}, inputs[i], dx, micro)

        return jax.lax.while_loop(lambda carry: carry[0] > low, body, (i, dx))[1]

    def body(k: jax.Array, state: Any) -> Any:
        carry, i, dx = state
        slot = rows.shape[0] - 1 - k
        row, trainable = rows[slot], trainable_of(carry)
        # The layer is computed again only once its output's gradient is there, or its activations would wait for it.
        x, dx = _barrier((inputs[row], skip(trainable, i, row, dx)))
        grads, dx = _layer_gradients(block, take(trainable, row), take(frozen, row), x, dx, micro)
        carry, dx = at_row(carry, grads, dx, row, slot)
        return carry, row - 1, dx

    top = jnp.asarray(inputs.shape[0] - 1, rows.dtype)
    carry, i, dx = jax.lax.fori_loop(0, rows.shape[0], body, (carry, top, dx))
    return carry, skip(trainable_of(carry), i, jnp.asarray(-1, rows.dtype), dx) if to_bottom else dx


def _input_gradient(block: Block, layer: Leaves, x: jax.Array, dx: jax.Array, micro: Any) -> jax.Array:
    """The gradient of a layer's input alone, `[M, B, T, D]`."""

    def of_micro(x: jax.Array, dx: jax.Array, micro: Any) -> jax.Array:
        return jax.vjp(lambda x: block(layer, x, micro), x)[1](dx)[0]

    return _map_micro(of_micro, x, dx, micro)


def _layer_gradients(
    block: Block, trainable: Leaves, frozen: Leaves, x: jax.Array, dx: jax.Array, micro: Any
) -> tuple[Leaves, jax.Array]:
    """One layer's gradients, summed over the micro-batches, and that of its input; the layer is computed again."""

    def of_micro(x: jax.Array, dx: jax.Array, micro: Any) -> tuple[Leaves, jax.Array]:
        _, vjp = jax.vjp(lambda p, x: block({**frozen, **p}, x, micro), dict(trainable), x)
        return vjp(dx)

    return sum_micro(of_micro, x, dx, micro)


def sum_micro(f: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
    """`f(*args of a micro-batch) -> (total, each)` over all micro-batches: totals summed, the others stacked.

    Several totals are summed in at least float32; of one micro-batch nothing is cast.
    """

    def one(args: Any) -> Any:
        return jax.tree.map(lambda a: a[0], args)

    if jax.tree.leaves(args)[0].shape[0] == 1:
        total, each = f(*one(args))
        return total, jax.tree.map(lambda a: a[None], each)

    def add(total: Any, args: Any) -> tuple[Any, Any]:
        new, each = f(*args)
        return jax.tree.map(lambda t, a: t + a.astype(t.dtype), total, new), each

    shapes = jax.eval_shape(f, *one(args))[0]
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, at_least_float32(a.dtype)), shapes)
    return jax.lax.scan(add, zeros, args)


def _map_micro(f: Callable[..., Any], *args: Any) -> Any:
    return sum_micro(lambda *args: ((), f(*args)), *args)[1]


def _zero_squares(trainable: Leaves) -> dict[str, jax.Array]:
    return {name: jnp.zeros((), at_least_float32(leaf.dtype)) for name, leaf in trainable.items()}


def _add_squares(total: Mapping[str, jax.Array], grads: Leaves) -> dict[str, jax.Array]:
    of_layer = squares(grads)
    return {name: total[name] + of_layer[name] for name in total}


def take(stacked: Any, i: jax.Array) -> Any:
    """Layer `i` of a stack."""
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), stacked)


def take_row(stacked: Any, i: jax.Array) -> Any:
    """Layer `i` of a stack, as a stack of one."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, i, 1), stacked)


def put_row(stacked: Any, row: Any, i: jax.Array) -> Any:
    """The stack with `row`, a stack of one, in place of layer `i`."""
    return jax.tree.map(lambda a, b: jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), i, 0), stacked, row)


def _row_bytes(stacked: Any) -> int:
    return sum(a.size // a.shape[0] * a.dtype.itemsize for a in jax.tree.leaves(stacked))
