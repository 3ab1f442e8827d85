"""Adan. (`optax.adan` 0.2.8 weighs the gradient difference with 1 − b2 where the authors use b2.)"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.clip import clip_coefficient
from jaxllm.optim.precision import in_float32


class ScaleByAdanState(NamedTuple):
    """State of `scale_by_adan`: `step`s done, and four trees like the parameters."""

    step: jax.Array
    m: optax.Updates
    v: optax.Updates
    n: optax.Updates
    prev_grad: optax.Updates


def scale_by_adan(
    b1: float = 0.98, b2: float = 0.92, b3: float = 0.99, eps: float = 1e-8, max_grad_norm: float = 0.0
) -> optax.GradientTransformation:
    """The direction u of `adan`, without rate and weight decay."""

    def init(params: optax.Params) -> ScaleByAdanState:
        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        return ScaleByAdanState(jnp.zeros([], jnp.int32), m=zeros(), v=zeros(), n=zeros(), prev_grad=zeros())

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdanState]:
        del params
        grads: Any = updates
        if not _is_zero(max_grad_norm):
            coefficient = clip_coefficient(jnp.asarray(optax.tree.norm(grads)), max_grad_norm, eps)
            coefficient = jnp.where(jnp.asarray(max_grad_norm) > 0, coefficient, 1.0)
            grads = jax.tree.map(lambda g: g * coefficient, grads)
        is_first = state.step == 0
        diff: Any = jax.tree.map(lambda g, prev: jnp.where(is_first, 0.0, g - prev), grads, state.prev_grad)

        m: Any = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, grads)
        v: Any = jax.tree.map(lambda v, d: b2 * v + (1 - b2) * d, state.v, diff)
        n: Any = jax.tree.map(lambda n, g, d: b3 * n + (1 - b3) * jnp.square(g + b2 * d), state.n, grads, diff)

        step = jnp.asarray(optax.safe_increment(state.step))

        def direction(m: jax.Array, v: jax.Array, n: jax.Array) -> jax.Array:
            # With float64 in JAX, a Python float to the power of an array is one.
            c1, c2, c3 = (jnp.asarray(1 - b**step, m.dtype) for b in (b1, b2, b3))
            return (m / c1 + b2 * v / c2) / (jnp.sqrt(n / c3) + eps)

        return jax.tree.map(direction, m, v, n), ScaleByAdanState(step, m, v, n, prev_grad=grads)

    return optax.GradientTransformation(init, update)


def _is_zero(setting: jax.typing.ArrayLike) -> bool:
    """Whether a setting is known to be 0 already; `optax.inject_hyperparams` makes arrays of them."""
    return isinstance(setting, int | float) and setting == 0


def adan(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.98,
    b2: float = 0.92,
    b3: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    no_prox: bool = False,
    max_grad_norm: float = 0.0,
    *,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Adan (Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm", arXiv 2208.06677), as in their code.

    At step t = 1, 2, … with gradient g (clipped), parameter θ, rate η and d = g − (the last step's g), d = 0
    at t = 1::

        m ← b1·m + (1 − b1)·g
        v ← b2·v + (1 − b2)·d
        n ← b3·n + (1 − b3)·(g + b2·d)²
        u = ( m/(1 − b1ᵗ) + b2·v/(1 − b2ᵗ) ) / ( √(n/(1 − b3ᵗ)) + eps )
        θ ← (θ − η·u) / (1 + η·weight_decay)          or, with no_prox, θ·(1 − η·weight_decay) − η·u

    State: m, v, n and the last gradient in float32, 16 bytes per parameter. The betas are decays, one minus
    the paper's. A usual rate is 5 to 10 times that of AdamW.

    Args:
        learning_rate: η, a number or an optax schedule of the 0-based step.
        b1: decay of the gradient's average.
        b2: decay of the average of gradient differences.
        b3: decay of the second moment.
        eps: added outside the root, and to the norm in clipping.
        weight_decay: multiplied by the rate; proximal unless `no_prox`.
        no_prox: weight decay as in AdamW instead of the proximal step.
        max_grad_norm: clips the norm of all gradients together; 0 = off.
        mask: tree of booleans (or a function of the parameters that returns one): the leaves that decay;
            None = all.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxllm.optim import adan
    >>> loss = lambda params: jnp.sum(params["w"] ** 2)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> tx = adan(0.1, weight_decay=0.02, max_grad_norm=1.0)
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for _ in range(200):
    ...     params, state = step(params, state)
    >>> bool(loss(params) < 0.01)
    True
    """

    def shrink(count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        return 1 / (1 + rate * weight_decay)

    stages = [
        scale_by_adan(b1, b2, b3, eps, max_grad_norm),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    ]
    if not (no_prox or _is_zero(weight_decay)):
        # (θ − ηu)/(1 + ηλ) − θ = −η(u + λθ)/(1 + ηλ): the decoupled step, divided.
        proximal = optax.scale_by_schedule(shrink)
        stages.append(proximal if mask is None else optax.masked(proximal, mask))
    return in_float32(optax.chain(*stages))
