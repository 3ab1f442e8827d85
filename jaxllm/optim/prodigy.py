"""Prodigy, as optax has it, with masked weight decay and a start without gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.precision import in_float32


def prodigy(
    learning_rate: optax.Schedule,
    betas: tuple[float, float],
    eps: float,
    estim_lr0: float,
    estim_lr_coef: float,
    weight_decay: float,
    safeguard_warmup: bool,
    mask: Callable[[optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
    """`optax.contrib.prodigy`, whose weight decay goes by `mask`.

    While all gradients have been zero (a batch without trained tokens), nothing but decay happens: optax divides zero
    by zero, and has no estimate ever after.
    """
    b1, b2 = betas
    inner = optax.contrib.prodigy(
        learning_rate, betas, None, eps, estim_lr0, estim_lr_coef, safeguard_warmup=safeguard_warmup
    )

    def init(params: optax.Params) -> optax.contrib.ProdigyState:
        m, v, grad_sum = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
        return optax.contrib.ProdigyState(
            exp_avg=m,
            exp_avg_sq=v,
            grad_sum=grad_sum,
            params0=jax.tree.map(jnp.copy, params),  # a buffer of its own, since a step gives both away
            estim_lr=jnp.asarray(estim_lr0, float),
            numerator_weighted=jnp.zeros((), float),
            count=jnp.zeros((), jnp.int32),
        )

    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        result: Any = inner.update(updates, state, params)
        moves, after = result
        started = optax.tree.norm(after.grad_sum, ord=jnp.inf) > 0
        after = after._replace(estim_lr=jnp.where(started, after.estim_lr, state.estim_lr))
        step = after.count
        rate = state.estim_lr * learning_rate(state.count) * jnp.sqrt(1 - b2**step) / (1 - b1**step)

        def decayed(move: jax.Array, p: jax.Array, decays: bool) -> jax.Array:
            move = jnp.where(started, move, 0)
            return move - weight_decay * rate * p if decays else move

        return jax.tree.map(decayed, moves, params, mask(params)), after

    return in_float32(optax.GradientTransformationExtraArgs(init, update))
