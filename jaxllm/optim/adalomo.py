"""AdaLomo."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.clip import clip_by_value_and_norm
from jaxllm.optim.precision import in_float32


class ScaleByFactoredMomentState(NamedTuple):
    """State of `scale_by_factored_moment`: `step`s done, and two trees like the parameters.

    A matrix [n, m] has `v_row` [n] and `v_col` [m]. A vector has its whole second moment in `v_row`, and in
    `v_col` a scalar 0: with a leaf at every place, `optax.tree.map_params` works on the state.
    """

    step: jax.Array
    v_row: optax.Updates
    v_col: optax.Updates


def scale_by_factored_moment(decay_rate: float = 0.8, eps: float = 1e-30) -> optax.GradientTransformation:
    """The direction u of `adalomo` before its RMS is clipped: g over the root of its second moment."""

    def init(params: optax.Params) -> ScaleByFactoredMomentState:
        jax.tree_util.tree_map_with_path(_refuse_stack, params)
        return ScaleByFactoredMomentState(
            step=jnp.zeros([], jnp.int32),
            v_row=jax.tree.map(lambda p: jnp.zeros(p.shape[:1], p.dtype), params),
            v_col=jax.tree.map(lambda p: jnp.zeros(p.shape[1:], p.dtype), params),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByFactoredMomentState]:
        del params
        step = jnp.asarray(optax.safe_increment(state.step))

        def average(g: jax.Array, old: jax.Array, axis: int) -> jax.Array:
            b2 = 1 - step.astype(g.dtype) ** -decay_rate
            s = jnp.square(g) + eps
            return b2 * old + (1 - b2) * (jnp.mean(s, axis) if g.ndim == 2 else s)

        def direction(g: jax.Array, row: jax.Array, col: jax.Array) -> jax.Array:
            if g.ndim < 2:
                return g * jax.lax.rsqrt(row)
            return g * jax.lax.rsqrt(row / jnp.mean(row))[:, None] * jax.lax.rsqrt(col)[None, :]

        v_row = jax.tree.map(lambda g, old: average(g, old, 1), updates, state.v_row)
        v_col = jax.tree.map(lambda g, old: average(g, old, 0) if g.ndim == 2 else old, updates, state.v_col)
        return (
            jax.tree.map(direction, updates, v_row, v_col),
            ScaleByFactoredMomentState(step, v_row, v_col),
        )

    return optax.GradientTransformation(init, update)


def _refuse_stack(path: Any, p: jax.Array) -> None:
    if p.ndim > 2:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise ValueError(
            f"AdaLomo keeps statistics of matrices and vectors, but {name!r} has shape {p.shape}. "
            "Vmap over the leading axis of a stack of matrices: jaxllm.optim.wrappers.per_layer"
        )


def adalomo(
    learning_rate: optax.ScalarOrSchedule,
    decay_rate: float = 0.8,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    *,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaLomo (Lv et al., "AdaLomo: Low-memory Optimization with Adaptive Learning Rate", arXiv 2310.10195).

    At step t = 1, 2, … for every matrix (a vector keeps V, the average of s, and u = g/√V), with gradient g
    (clipped as in `lomo`), parameter θ and rate η::

        s = g² + eps[0];   b = 1 − t^(−decay_rate)
        R ← b·R + (1 − b)·rowmeans(s);   C ← b·C + (1 − b)·colmeans(s)
        u = g / √( R·Cᵀ / mean(R) )
        u ← u / max(1, RMS(u)/clip_threshold)
        θ ← θ − η·max(eps[1], RMS(θ))·( u + weight_decay·θ )

    It is Adafactor (Shazeer & Stern, arXiv 1804.04235, algorithm 5) without momentum, made for the fused
    backward pass. State in float32: 4·(n + m) bytes for a matrix [n, m], 4 bytes per entry of a vector.

    The statistics are of one leaf: a stack of layers must go through `wrappers.per_layer`, or its layers mix.
    The step hardly depends on the gradient's scale, so the authors advise against `clip_grad_norm`.

    Args:
        learning_rate: η, a number or an optax schedule of the 0-based step (the authors: 5e-4 to 1e-3).
        decay_rate: how fast the memory of the second moment grows.
        eps: added to the squared gradient; the least scale of a parameter.
        clip_threshold: the largest RMS of a tensor's update, before the rate and the parameter's scale.
        weight_decay: multiplied by the rate and by the parameter's scale.
        clip_grad_norm: the largest norm of all gradients together; None = no limit.
        clip_grad_value: the largest magnitude of a gradient's entry; None = no limit.
        mask: tree of booleans (or a function of the parameters that returns one): the leaves that decay;
            None = all.

    Raises:
        ValueError: from `init`, for a leaf of more than two dimensions.

    >>> import jax, jax.numpy as jnp, optax
    >>> from jaxllm.optim import adalomo
    >>> loss = lambda params: jnp.sum(params["w"] ** 2)
    >>> params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]])}
    >>> tx = adalomo(optax.linear_schedule(0.3, 0.0, 100))
    >>> @jax.jit
    ... def step(params, state):
    ...     updates, state = tx.update(jax.grad(loss)(params), state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     params, state = step(params, state)
    >>> bool(loss(params) < 0.01), state[1].v_row["w"].shape
    (True, (2,))
    """
    return in_float32(
        optax.chain(
            clip_by_value_and_norm(clip_grad_norm, clip_grad_value),
            scale_by_factored_moment(decay_rate, eps[0]),
            optax.clip_by_block_rms(clip_threshold),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_param_block_rms(eps[1]),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
