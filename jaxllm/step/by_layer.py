"""The update of one layer after the other, once all gradients are known, for optimizers that need whole matrices.

However a matrix is sharded, its decomposition has it whole on each device, in float32, and so have some products. Here
one matrix of one layer is updated at a time and written in the old one's place, so neither the matrices of all layers
nor their updates exist at once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core import tree
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.step.leaf_update import GuardedUpdate
from jaxllm.step.state import over_replicas
from jaxllm.step.sweep import put_row, take_row


def update_by_layer(
    visitor: GuardedUpdate, lm: LM, params: Params, grads: Params, opt_state: optax.OptState, *, scattered: bool
) -> tuple[Params, optax.OptState]:
    """The parameters and the optimizer's state after the update of `visitor`.

    scattered: each replica has a part of `grads` and `opt_state`, see `over_replicas`.
    """
    slots, common = visitor.update.split(params, opt_state)
    of_params, shardings = tree.flatten(grads), tree.flatten(lm.shardings())
    order = jnp.asarray(lm.layer_order)

    def updated(name: str, param: jax.Array) -> tuple[Any, Any]:
        def visit(param: Any, slot: Any, grad: Any, layers: jax.Array | None = None) -> tuple[Any, Any]:
            new, new_slots, _ = visitor({name: param}, {name: grad}, {name: slot}, common, layers)
            return new[name], new_slots[name]

        def visit_each(param: Any, slot: Any, grad: Any, layers: jax.Array) -> tuple[Any, Any]:
            def body(i: jax.Array, new: tuple[Any, Any]) -> tuple[Any, Any]:
                return put_row(new, visit(*take_row((*new, grad, layers), i)), i)

            return jax.lax.fori_loop(0, layers.shape[0], body, (param, slot))

        leaf = param, slots[name], of_params[name]
        if not name.startswith("layers/"):
            return visit(*leaf)
        if param.ndim < 3:  # vectors
            return visit(*leaf, order)
        sharding = over_replicas(shardings[name], param.shape) if scattered else shardings[name]
        return _on_shards(visit_each, sharding)(*leaf, order)

    new = {name: updated(name, param) for name, param in tree.flatten(params).items()}
    new_slots = {name: slot for name, (_, slot) in new.items()}
    opt_state = visitor.update.join(params, new_slots, visitor({}, {}, {}, common)[2])
    return visitor.update.nested({name: param for name, (param, _) in new.items()}), opt_state


def _on_shards(walk: Callable[..., Any], sharding: NamedSharding) -> Callable[..., Any]:
    """`walk` through a stack of layers, in which devices that hold different layers walk through these at a time."""
    mesh, layers = sharding.mesh, tuple(sharding.spec)[:1]
    axes = layers[0] if layers else None
    if axes is None:
        return walk
    shards = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))

    def split(a: jax.Array) -> jax.Array:
        a = a.reshape(shards, a.shape[0] // shards, *a.shape[1:])
        free = [PartitionSpec.UNCONSTRAINED] * (a.ndim - 1)
        return jax.lax.with_sharding_constraint(a, NamedSharding(mesh, PartitionSpec(axes, *free)))

    def run(*stacks: Any) -> Any:
        new = jax.vmap(walk, spmd_axis_name=axes)(*jax.tree.map(split, stacks))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), new)

    return run
