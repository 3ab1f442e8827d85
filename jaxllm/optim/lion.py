"""Lion."""

from typing import Any

import optax

from jaxllm.optim.precision import in_float32


def lion(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    *,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675).

    With gradient g, parameter θ and rate η::

        θ ← θ − η·( sign(b1·m + (1 − b1)·g) + weight_decay·θ )
        m ← b2·m + (1 − b2)·g

    State: m in float32, 4 bytes per parameter. The authors advise a rate 3 to 10 times smaller, and a weight
    decay as many times larger, than for AdamW.

    Args:
        learning_rate: η, a number or an optax schedule of the 0-based step.
        b1: weight of the momentum in the step.
        b2: decay of the momentum.
        weight_decay: decoupled, multiplied by the rate.
        mask: tree of booleans (or a function of the parameters that returns one): the leaves that decay;
            None = all.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxllm.optim import lion
    >>> loss = lambda params: jnp.sum(params["w"] ** 2)
    >>> params = {"w": jnp.array([1.0, -2.0])}
    >>> tx = lion(optax.linear_schedule(0.1, 0.0, 100))
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     params, state = step(params, state)
    >>> bool(loss(params) < 0.01)
    True
    """
    tx = optax.lion(learning_rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask)
    return in_float32(tx, complex_leaves=True)
