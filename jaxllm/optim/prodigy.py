"""Prodigy, with masked weight decay, a start without gradients, and no second copy of its state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.precision import in_float32


def prodigy(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    estim_lr0: float = 1e-6,
    estim_lr_coef: float = 1.0,
    weight_decay: float = 0.0,
    safeguard_warmup: bool = False,
    *,
    mask: Callable[[optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
    """Prodigy (Mishchenko and Defazio, arXiv 2306.06101), in the form of `optax.contrib.prodigy` and with its state.

    With gradient g, parameter θ (θ₀ at first), the rate η of the schedule times Adam's bias corrections, and the
    estimate d, all sums being over all parameters::

        r ← √b2·r + (d/d₀)·η·d·Σ g·(θ₀ − θ);   s ← √b2·s + (d/d₀)·η·d·g;   d' = max(d, coef·r / Σ|s|)
        m ← b1·m + (1 − b1)·d·g;   v ← b2·v + (1 − b2)·(d·g)²
        θ ← θ − η·d·( m/(√v + d'·eps) + weight_decay·θ );   d ← d'

    While all gradients have been zero (a batch without trained tokens) nothing but decay happens: optax divides zero by
    zero, and has no estimate ever after. State: 16 bytes per parameter.

    Args:
        learning_rate: what the estimated rate is multiplied by, at the schedule's peak; leave it at 1.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added outside the root, times the estimate.
        estim_lr0: the first estimate, which only grows.
        estim_lr_coef: what the estimates are multiplied by.
        weight_decay: decoupled, multiplied by the rate.
        safeguard_warmup: whether the schedule's rate is left out of the estimate's weights, for a long warm-up.
        mask: function of the parameters that returns a tree of booleans: the leaves that decay.
    """
    b3 = b2**0.5

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
        d, step = state.estim_lr, jnp.asarray(optax.safe_increment(state.count))
        peak = learning_rate(state.count) if callable(learning_rate) else learning_rate
        rate = d * peak * jnp.sqrt(1 - b2**step) / (1 - b1**step)
        weight = (d if safeguard_warmup else rate) * d / estim_lr0

        def summed(g: jax.Array, s: jax.Array) -> jax.Array:
            return b3 * s + weight * g

        along = jax.tree.map(lambda g, p, start: jnp.sum(g * (start - p)), updates, params, state.params0)
        numerator = b3 * state.numerator_weighted + d / estim_lr0 * rate * optax.tree.sum(along)
        sizes = jax.tree.map(lambda g, s: jnp.sum(jnp.abs(summed(g, s))), updates, state.grad_sum)
        denominator = jnp.asarray(optax.tree.sum(sizes))
        started = denominator > 0
        estimate = jnp.where(started, jnp.maximum(d, estim_lr_coef * numerator / denominator), d)

        def moved(g: jax.Array, p: jax.Array, decays: bool, *of_state: jax.Array) -> tuple[jax.Array, ...]:
            # What the estimate was made of is computed again: kept, it would be a second copy of the state.
            (m, v, s), new_d = jax.lax.optimization_barrier((of_state, estimate))
            m, v = b1 * m + (1 - b1) * d * g, b2 * v + (1 - b2) * jnp.square(d * g)
            move = jnp.where(started, -rate * m / (jnp.sqrt(v) + new_d * eps), 0)
            return move - weight_decay * rate * p if decays else move, m, v, summed(g, s)

        of_state = state.exp_avg, state.exp_avg_sq, state.grad_sum
        each = jax.tree.map(moved, updates, params, mask(params), *of_state)
        moves, m, v, grad_sum = jax.tree.transpose(jax.tree.structure(updates), jax.tree.structure((0,) * 4), each)
        return moves, optax.contrib.ProdigyState(m, v, grad_sum, state.params0, estimate, numerator, step)

    return in_float32(optax.GradientTransformationExtraArgs(init, update))
