"""Transforms of transforms that know how a model's parameters are stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core import tree
from jaxllm.core.errors import UserError


def per_layer(
    tx: optax.GradientTransformation, stacked: Sequence[str] = ("layers/*",)
) -> optax.GradientTransformationExtraArgs:
    """`tx` applied to each layer's own array where a model stores layers stacked on a leading axis.

    A transform with statistics of a tensor (an RMS, a row mean, a factored moment) mixes the layers of a leaf
    `[layers, in, out]`; here it sees `layers` matrices `[in, out]`, as if they were stored one by one. Leaves
    whose paths match one of the globs `stacked` are vmapped over their first axis, the others are left to
    `tx` as they are. Stacks of several lengths may stand side by side, and a second `per_layer` around the
    first takes a second leading axis (experts). No axis is reshaped or moved, so the parameters' sharding
    carries over, and an element-wise `tx` costs what it costs without.

    The state has the structure of `tx`'s own: leaves that belong to a parameter get the leading axis, others
    (step counts) are common to all layers. Extra arguments of `update` with the structure of the gradients
    (`hessian_grads`) are taken apart as these are; others are passed on whole.

    `tx` must treat leaves separately. A global norm inside `tx` would be that of one layer, so clipping goes
    before `per_layer`; a transform that keeps one number about all leaves (Prodigy's step size) is refused.

    Raises:
        UserError: a leaf that matches `stacked` is a scalar.
        ValueError: `tx` keeps a number about all leaves that would differ between layers.
    """
    inner = optax.with_extra_args_support(tx)

    def init(params: optax.Params) -> optax.OptState:
        states: list[Any] = []
        for group in _groups(inner, params, stacked):
            init_group = jax.vmap(inner.init, out_axes=group.state_axes) if group.layers else inner.init
            states.append(init_group(group.of_params(params)))
        return tree.combine(*states)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        structure = jax.tree.structure(updates)
        by_leaf = {name: arg for name, arg in extra_args.items() if jax.tree.structure(arg) == structure}
        whole = {name: arg for name, arg in extra_args.items() if name not in by_leaf}

        def update_one(updates: Any, state: Any, params: Any, by_leaf: dict[str, Any]) -> Any:
            return inner.update(updates, state, params, **by_leaf, **whole)

        results: list[Any] = []
        for group in _groups(inner, updates, stacked):
            axes = group.state_axes
            update_group = (
                jax.vmap(update_one, in_axes=(0, axes, 0, 0), out_axes=(0, axes)) if group.layers else update_one
            )
            results.append(
                update_group(
                    group.of_params(updates),
                    group.of_state(state),
                    None if params is None else group.of_params(params),
                    {name: group.of_params(arg) for name, arg in by_leaf.items()},
                )
            )
        return tree.combine(*results)

    return optax.GradientTransformationExtraArgs(init, update)


@dataclass(frozen=True)
class _Group:
    """Leaves that are treated alike: stacks of `layers` layers, or with `layers` = 0 the unstacked ones.

    `mask` tells which leaves. `state` is the state of one layer, abstractly, with None at the places of other
    groups' parameters; `state_axes` has 0 for its leaves that belong to a parameter and None for the others.
    """

    layers: int
    mask: tree.Tree
    state: tree.Tree
    state_axes: tree.Tree

    def of_params(self, params: tree.Tree) -> tree.Tree:
        return tree.partition(params, self.mask)[0]

    def of_state(self, state: tree.Tree) -> tree.Tree:
        def keep(own: Any, leaf: Any) -> Any:
            return None if own is None else leaf

        return jax.tree.map(keep, self.state, state, is_leaf=lambda leaf: leaf is None)


def _groups(tx: optax.GradientTransformation, params: tree.Tree, stacked: Sequence[str]) -> list[_Group]:
    """The groups that `params` falls into; the one of unstacked leaves comes first and is always there."""

    def layers_of(path: str, p: jax.Array, in_stack: bool) -> int:
        if in_stack and not p.ndim:
            raise UserError(f"the parameter {path!r} is a scalar, so it cannot be a stack of layers")
        return p.shape[0] if in_stack else 0

    layers = tree.map_with_path(layers_of, params, tree.match(params, *stacked, allow_unmatched=True))

    def group(size: int) -> _Group:
        mask = jax.tree.map(lambda n: n == size, layers)
        one = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(p.shape[1:] if size else p.shape, p.dtype),
            tree.partition(params, mask)[0],
        )
        state = jax.eval_shape(tx.init, one)
        axes = optax.tree.map_params(tx, lambda _: 0, state, transform_non_params=lambda _: None)
        return _Group(size, mask, state, axes)

    return [group(size) for size in sorted({0, *jax.tree.leaves(layers)})]


def scale_updates(
    tx: optax.GradientTransformation, factors: Mapping[str, float]
) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose updates are multiplied by the factor of the first pattern in `factors` that matches their path.

    Where an update is proportional to the learning rate, that is a learning rate of its own.
    """
    inner = optax.with_extra_args_support(tx)
    rules = [*factors.items(), ("*", 1.0)]

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = inner.update(updates, state, params, **extra_args)
        scaled = jax.tree.map(lambda u, f: u if f == 1 else u * f, updates, tree.first_match(updates, rules))
        return scaled, state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def without_padding(
    tx: optax.GradientTransformation, padded: Mapping[str, tuple[int, int]]
) -> optax.GradientTransformationExtraArgs:
    """`tx` applied to the real part of leaves that are padded in memory: their padding is never updated.

    For a transform with statistics of a tensor (an RMS, a row mean): the zeros of a padded vocabulary would be counted,
    so that the result would depend on the mesh. `padded` has, by the leaf's path, its padded dimension and the real
    size of that. Extra arguments of `update` with the structure of the gradients are cut too; others are passed on
    whole.
    """
    inner = optax.with_extra_args_support(tx)

    def cut(leaves: Any) -> Any:
        def real(path: str, leaf: jax.Array) -> jax.Array:
            if path not in padded:
                return leaf
            axis, size = padded[path]
            return jax.lax.slice_in_dim(leaf, 0, size, axis=axis)

        return tree.map_with_path(real, leaves)

    def filled(path: str, update: jax.Array, leaf: jax.Array) -> jax.Array:
        return jnp.pad(update, [(0, whole - real) for whole, real in zip(leaf.shape, update.shape, strict=True)])

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(cut(params))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        structure = jax.tree.structure(updates)
        extra = {name: cut(a) if jax.tree.structure(a) == structure else a for name, a in extra_args.items()}
        new, state = inner.update(cut(updates), state, None if params is None else cut(params), **extra)
        return tree.map_with_path(filled, new, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def layer_matrices(params: tree.Tree) -> tree.Tree:
    """Which of one layer's parameters, as `per_layer` gives them to its transform, are matrices."""
    return tree.map_with_path(lambda path, p: path.startswith("layers/") and p.ndim == 2, params)
