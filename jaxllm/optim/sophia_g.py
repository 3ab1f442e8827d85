"""Sophia-G. (`optax.contrib.sophia` is another algorithm: Hutchinson's estimator, corrected momentum.)"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.precision import at_least_float32, in_float32

_EPS = 1e-15


class ScaleBySophiaGState(NamedTuple):
    """State of `scale_by_sophia_g`: momentum and diagonal Hessian, two trees like the parameters."""

    m: optax.Updates
    h: optax.Updates


def scale_by_sophia_g(
    b1: float = 0.965, b2: float = 0.99, rho: float = 0.04, batch_tokens: int = 1
) -> optax.GradientTransformationExtraArgs:
    """The clipped direction of `sophia_g`, without rate and weight decay."""

    def init(params: optax.Params) -> ScaleBySophiaGState:
        return ScaleBySophiaGState(m=jax.tree.map(jnp.zeros_like, params), h=jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        hessian_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleBySophiaGState]:
        del params, extra_args
        m: Any = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.m, updates)
        direction: Any = jax.tree.map(
            lambda m, h: jnp.sign(m) * jnp.minimum(1.0, jnp.abs(m) / (rho * batch_tokens * h + _EPS)),
            m,
            state.h,
        )
        h: Any = state.h
        if hessian_grads is not None:
            h = jax.tree.map(lambda h, g: b2 * h + (1 - b2) * jnp.square(g), h, at_least_float32(hessian_grads))
        return direction, ScaleBySophiaGState(m, h)

    return optax.GradientTransformationExtraArgs(init, update)


def win_rate(opt_state: optax.OptState, rho: float, batch_tokens: int, padding: int = 0) -> jax.Array:
    """The share of entries that the Hessian scales: |m| < rho·batch_tokens·h; the others were clipped to ±1.

    Its authors keep it between 0.1 and 0.5; raise `rho` when it is lower. `opt_state` is a state of
    `sophia_g`, alone or inside a chain. After a step with `hessian_grads` it tells of the moved Hessian.
    padding: how many entries are always zero and do not count.
    """
    m = jax.tree.leaves(optax.tree.get(opt_state, "m"))
    h = jax.tree.leaves(optax.tree.get(opt_state, "h"))

    def wins(m: jax.Array, h: jax.Array) -> jax.Array:
        # Row by row: a float32 that counts one by one stops at 2²⁴.
        of_rows = jnp.sum(jnp.atleast_1d(jnp.abs(m) < rho * batch_tokens * h), axis=-1, dtype=jnp.int32)
        return jnp.sum(of_rows.astype(jnp.float32))

    return sum(map(wins, m, h), jnp.zeros((), jnp.float32)) / float(sum(leaf.size for leaf in m) - padding)


def sophia_g(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.965,
    b2: float = 0.99,
    rho: float = 0.04,
    weight_decay: float = 0.1,
    batch_tokens: int = 1,
    *,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Sophia-G (Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer", arXiv 2305.14342).

    `update(grads, state, params, hessian_grads=None)`: with gradient g, parameter θ and rate η::

        m ← b1·m + (1 − b1)·g                                                      (no bias correction)
        θ ← θ − η·( sign(m)·min(1, |m| / (rho·batch_tokens·h + 1e-15)) + weight_decay·θ )
        h ← b2·h + (1 − b2)·ĝ²                       afterwards, and only when `hessian_grads` = ĝ is given

    ĝ is the gradient of the mean cross-entropy against labels *drawn from the model's own softmax*
    (Gauss-Newton-Bartlett), clipped as g is, and taken every k-th step (the authors: k = 10); h serves from
    the next step on. Until the first ĝ the step is η·sign(m).

    State: m and h in float32, 8 bytes per parameter.

    Args:
        learning_rate: η, a number or an optax schedule of the 0-based step.
        b1: decay of the momentum.
        b2: decay of the Hessian.
        rho: larger scales more entries and clips fewer: raise it while train/sophia_win_rate is below 0.1, lower it
            above 0.5.
        weight_decay: decoupled, multiplied by the rate.
        batch_tokens: the number of tokens over which the loss of ĝ is averaged, the whole global batch.
        mask: tree of booleans (or a function of the parameters that returns one): the leaves that decay;
            None = all.

    A logistic regression whose ĝ comes from labels drawn from the model, every tenth step:

    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxllm.optim import sophia_g
    >>> x = jax.random.normal(jax.random.key(0), (64, 2))
    >>> labels = x[:, 0] > x[:, 1]
    >>> loss = lambda params, y: optax.sigmoid_binary_cross_entropy(x @ params["w"], y).mean()
    >>> params = {"w": jnp.array([-1.0, 2.0])}
    >>> tx = sophia_g(0.1, weight_decay=0.0, batch_tokens=64)
    >>> @jax.jit
    ... def step(params, state, key=None):
    ...     drawn = None if key is None else jax.random.bernoulli(key, jax.nn.sigmoid(x @ params["w"]))
    ...     curvature = None if key is None else jax.grad(loss)(params, drawn)
    ...     grads = jax.grad(loss)(params, labels)
    ...     updates, state = tx.update(grads, state, params, hessian_grads=curvature)
    ...     return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for i in range(100):
    ...     params, state = step(params, state, jax.random.key(i) if i % 10 == 9 else None)
    >>> bool(loss(params, labels) < 0.2)
    True
    """
    return in_float32(
        optax.chain(
            scale_by_sophia_g(b1, b2, rho, batch_tokens),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
