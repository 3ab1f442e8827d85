"""LOMO."""

from typing import Any

import optax

from jaxllm.optim.clip import clip_by_value_and_norm
from jaxllm.optim.precision import in_float32


def lomo(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float = 0.0,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    *,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """LOMO (Lv et al., "Full Parameter Fine-tuning for LLMs with Limited Resources", arXiv 2306.09782).

    With gradient g, parameter θ and rate η::

        θ ← θ − η·( c·clamp(g, ±clip_grad_value) + weight_decay·θ )
        c = min(1, clip_grad_norm / (‖g‖ + 1e-6))          over all gradients together, before the clamp

    State: none, 0 bytes per parameter. The rule is plain SGD; the memory that LOMO saves comes from applying
    it to each layer inside the backward pass. Rates are those of SGD (the authors: 0.03 to 0.05).

    Args:
        learning_rate: η, a number or an optax schedule of the 0-based step.
        weight_decay: decoupled, multiplied by the rate.
        clip_grad_norm: the largest norm of all gradients together; None = no limit.
        clip_grad_value: the largest magnitude of an entry; None = no limit.
        mask: tree of booleans (or a function of the parameters that returns one): the leaves that decay;
            None = all.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxllm.optim import lomo
    >>> loss = lambda params: jnp.sum(params["w"] ** 2)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> tx = lomo(0.05, clip_grad_norm=1.0)
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     params, state = step(params, state)
    >>> bool(loss(params) < 0.01), jax.tree.leaves(state)
    (True, [])
    """
    return in_float32(
        optax.chain(
            clip_by_value_and_norm(clip_grad_norm, clip_grad_value),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        ),
        complex_leaves=clip_grad_value is None,  # complex numbers have no order
    )
