"""AdamW."""

from typing import Any

import optax

from jaxllm.optim.precision import in_float32


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW (Loshchilov & Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101), as in PyTorch.

    At step t = 1, 2, … with gradient g, parameter θ and rate η::

        m ← b1·m + (1 − b1)·g
        v ← b2·v + (1 − b2)·g²
        θ ← θ − η·( m/(1 − b1ᵗ) / (√(v/(1 − b2ᵗ)) + eps) + weight_decay·θ )

    State: m and v in float32, 8 bytes per parameter.

    Args:
        learning_rate: η, a number or an optax schedule of the 0-based step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added outside the root.
        weight_decay: decoupled, multiplied by the rate.
        mask: tree of booleans (or a function of the parameters that returns one): the leaves that decay;
            None = all.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxllm.optim import adamw
    >>> loss = lambda params: jnp.sum(params["w"] ** 2)
    >>> params = {"w": jnp.array([1.0, -2.0], jnp.bfloat16)}
    >>> tx = adamw(0.1, weight_decay=0.01)
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     params, state = step(params, state)
    >>> bool(loss(params) < 0.01), params["w"].dtype.name, optax.tree.get(state, "nu")["w"].dtype.name
    (True, 'bfloat16', 'float32')
    """
    tx = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask)
    return in_float32(tx, complex_leaves=True)
