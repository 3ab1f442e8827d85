"""What a step is given: the arrays of a batch, and the keys of what it draws."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.models.lm import LM

Batch = Mapping[str, jax.Array]

# The dimensions of every array of a batch: micro-batches, sequences, tokens.
BATCH_AXES = ("micro", "batch", "act_inner_length")

# What a step draws random numbers for.
DROPOUT, ROUNDING, TARGETS, LAYERS = range(4)


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
