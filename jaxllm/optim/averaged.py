"""Schedule-free optimizers: what is trained is not what is evaluated."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.precision import in_float32


def schedule_free(
    base: optax.GradientTransformation, learning_rate: optax.Schedule, b1: float
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.schedule_free` with the rate of each step itself, and state for a tree with holes.

    Defazio et al., "The Road Less Scheduled", arXiv 2405.15682. With the update u of `base` (without momentum) at the
    parameters y and the rate η, whose largest value so far is η̂, and w the sum of all η̂² so far::

        z ← z + u;   x ← (1 − c)·x + c·z with c = η̂²/w;   y ← b1·x + (1 − b1)·z

    The gradient is taken at y, and x is the result, see `evaluation_params`. State: z in float32, and that of `base`.
    """
    # optax's own counts from 1, and would take the rate of the step after.
    inner = optax.contrib.schedule_free(base, lambda count: learning_rate(count - 1), b1)

    def init(params: optax.Params) -> optax.contrib.ScheduleFreeState:
        return optax.contrib.ScheduleFreeState(
            b1=jnp.asarray(b1, float),
            weight_sum=jnp.zeros((), float),
            step_count=jnp.ones((), jnp.int32),
            max_lr=jnp.zeros((), float),
            base_optimizer_state=base.init(params),
            z=jax.tree.map(jnp.copy, params),  # a buffer of its own, since a step gives both away
        )

    return in_float32(optax.GradientTransformationExtraArgs(init, inner.update))


def evaluation_params(params: Any, z: Any, b1: float) -> Any:
    """x of `schedule_free`, in the dtypes of `params`, which are its y; `z` is that of its state."""

    def averaged(y: jax.Array, z: jax.Array) -> jax.Array:
        return ((y - (1 - b1) * z) / b1).astype(y.dtype)

    return jax.tree.map(averaged, params, z)
