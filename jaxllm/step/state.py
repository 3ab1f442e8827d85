"""What a training step carries."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core import tree
from jaxllm.core.host_memory import HOST
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params

# The defaults of torch's GradScaler (half its first scale), and the bounds of Apex and DeepSpeed.
FIRST_LOSS_SCALE, SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE = 2.0**15, 1.0, 2.0**24
LOSS_SCALE_GROWS_AFTER = 2000


class LossScale(NamedTuple):
    """What the objective is multiplied by, so that small gradients are not lost in float16.

    Micikevicius et al., arXiv 1710.03740, section 3.2, made dynamic. scale: float32 scalar, a power of two.
    good_steps: int32 scalar, steps in a row that were applied since the scale last changed.
    """

    scale: Any
    good_steps: Any

    def after(self, good: jax.Array, overflow: jax.Array) -> "LossScale":
        """The scale of the next step: halved after an overflow, doubled after LOSS_SCALE_GROWS_AFTER good steps."""
        counted = jnp.where(good, self.good_steps + 1, jnp.where(overflow, 0, self.good_steps))
        grown = counted == LOSS_SCALE_GROWS_AFTER
        factor = jnp.where(overflow, 0.5, jnp.where(grown, 2.0, 1.0)).astype(self.scale.dtype)
        scale = jnp.clip(self.scale * factor, SMALLEST_LOSS_SCALE, LARGEST_LOSS_SCALE)
        return LossScale(scale, jnp.where(grown, 0, counted))


REPLICAS = "data"
"""The mesh axis of groups of devices that differ in their sequences alone."""


class Optimizer(Protocol):
    """What a state is made for: a transform of optax, or one that also has a `map_params` of its own."""

    @property
    def init(self) -> Callable[[Params], Any]: ...


class TrainState(NamedTuple):
    """The state of a run between two steps.

    step: int32 scalar, updates applied, which the schedule counts. params, frozen: the two halves of
    `tree.partition` by what trains. loss_scale: of float16 gradients; None where nothing is scaled.
    """

    step: Any
    params: Params
    frozen: Params
    opt_state: optax.OptState
    loss_scale: LossScale | None = None


Metrics = Mapping[str, jax.Array]
Step = Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, Metrics]]
"""`(state, batch) → (state, metrics)`"""


def new_state(params: Params, trainable: Any, tx: Optimizer, *, scale_loss: bool = False) -> TrainState:
    """The state before the first step. Frozen leaves get no optimizer state."""
    chosen, frozen = tree.partition(params, trainable)
    loss_scale = None
    if scale_loss:
        loss_scale = LossScale(jnp.full((), FIRST_LOSS_SCALE, jnp.float32), jnp.zeros((), jnp.int32))
    return TrainState(jnp.zeros((), jnp.int32), chosen, frozen, tx.init(chosen), loss_scale)


def abstract_state(
    params: Params,
    trainable: Any,
    tx: Optimizer,
    layout: Layout,
    *,
    scale_loss: bool = False,
    scattered: bool = False,
    whole_layers: bool = False,
    offloaded: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of `new_state`, for abstract `params` that have shardings.

    A leaf of the optimizer's state lies where its parameter does, see `laid_like`; what belongs to no parameter is held
    by every device. scattered: each replica holds a part of such leaves, see `over_replicas`; whole_layers: namely a
    part of every layer, for updates of one layer at a time. offloaded: such leaves lie in the host's memory; of devices
    that are only compiled for, JAX knows no memories, and they lie on these.
    """
    shapes = jax.eval_shape(lambda params: new_state(params, trainable, tx, scale_loss=scale_loss), params)

    def place(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def beside(leaf: jax.ShapeDtypeStruct, param: Any, path: str) -> jax.ShapeDtypeStruct:
        sharding = laid_like(leaf.shape, param)
        if scattered:
            sharding = over_replicas(sharding, leaf.shape, int(whole_layers and path.startswith("layers/")))
        return place(leaf, sharding.with_memory_kind(HOST) if offloaded else sharding)

    chosen, frozen = tree.partition(params, trainable)
    opt_state = map_params(tx, beside, shapes.opt_state, chosen, lambda leaf: place(leaf, layout.replicated))
    step, loss_scale = jax.tree.map(lambda leaf: place(leaf, layout.replicated), (shapes.step, shapes.loss_scale))
    return TrainState(step, chosen, frozen, opt_state, loss_scale)


def laid_like(shape: tuple[int, ...], param: Any) -> NamedSharding:
    """Where an array `shape` of the state of `param` lies: each axis as an axis of the parameter that is as long.

    So moments lie as the parameter, and the moments of a projection along the axis that they share with it. A mesh axis
    that split the projected axis splits the first axis that it divides. Statistics that have fewer axes are
    small, and every device holds them.
    """
    mesh = param.sharding.mesh
    if len(shape) != param.ndim:
        return NamedSharding(mesh, PartitionSpec())
    spec = (*param.sharding.spec, *(None,) * (param.ndim - len(param.sharding.spec)))
    moved = [axis for axis, size in enumerate(param.shape) if size != shape[axis]]
    laid = []
    for axis, size in enumerate(shape):
        like = axis if axis not in moved else next((other for other in moved if param.shape[other] == size), None)
        laid.append(None if like is None or spec[like] in laid else spec[like])
    for part in spec:
        if part is not None and part not in laid:
            ways = math.prod(mesh.shape[name] for name in _names(part))
            free = (axis for axis, at in enumerate(laid) if at is None and axis and shape[axis] % ways == 0)
            if (axis := next(free, None)) is not None:
                laid[axis] = part
    return NamedSharding(mesh, PartitionSpec(*laid))


def _names(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one dimension of a PartitionSpec is split over."""
    return part if isinstance(part, tuple) else (part,) if part else ()


def map_params(
    tx: Any, f: Callable[..., Any], state: Any, params: Params, otherwise: Callable[[Any], Any] = lambda leaf: leaf
) -> Any:
    """`f(leaf, its parameter, the path of that)` for each leaf of the state of `tx` that belongs to a parameter,
    `otherwise(leaf)` for the others."""
    if (own := getattr(tx, "map_params", None)) is not None:
        return own(f, state, params, otherwise)
    return optax.tree.map_params(tx, f, state, params, tree.paths(params), transform_non_params=otherwise)


def over_replicas(sharding: NamedSharding, shape: Sequence[int], whole: int = 0) -> NamedSharding:
    """`sharding`, with the first dimension that divides split over the replicas as well: ZeRO's stage 1 (Rajbhandari et
    al., arXiv 1910.02054, section 5) for the gradient and the optimizer's state of a parameter of this shape.

    whole: the number of leading dimensions that are not split. As it is, where no dimension divides or the replicas are
    split already.
    """
    mesh = sharding.mesh
    axes = [_names(part) for part in sharding.spec]
    axes += [()] * (len(shape) - len(axes))
    if mesh.shape[REPLICAS] == 1 or any(REPLICAS in part for part in axes):
        return sharding
    for i, (part, size) in enumerate(zip(axes, shape, strict=True)):
        if i >= whole and size % math.prod(mesh.shape[axis] for axis in (*part, REPLICAS)) == 0:
            return NamedSharding(mesh, PartitionSpec(*axes[:i], (*part, REPLICAS), *axes[i + 1 :]))
    return sharding
