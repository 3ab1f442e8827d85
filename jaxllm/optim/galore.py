"""GaLore: Adam's moments of the layers' matrices in a subspace. (`optax.contrib.galore` keeps the longer side's.)"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.precision import in_float32

Choose = Callable[[Any], Any]
"""Parameters → a tree of booleans like them: which are matrices to project."""


class ScaleByGaLoreState(NamedTuple):
    """State of `scale_by_galore`: `step`s done, and three trees like the parameters.

    A matrix of the sides s ≤ l has moments [l, r] and the projector [s, r]; all else has whole moments and a scalar 0.
    """

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    projector: optax.Updates


def scale_by_galore(
    choose: Choose, rank: int, update_proj_gap: int, scale: float, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """The direction of `galore`, without rate and weight decay."""
    adam = optax.scale_by_adam(b1, b2, eps)

    def init(params: optax.Params) -> ScaleByGaLoreState:
        chosen = choose(params)

        def moment(p: jax.Array, projected: bool) -> jax.Array:
            return jnp.zeros((max(p.shape), min(rank, *p.shape)) if projected else p.shape, p.dtype)

        def projector(p: jax.Array, projected: bool) -> jax.Array:
            return jnp.zeros((min(p.shape), min(rank, *p.shape)) if projected else (), p.dtype)

        mu, nu = (jax.tree.map(moment, params, chosen) for _ in range(2))
        return ScaleByGaLoreState(jnp.zeros([], jnp.int32), mu, nu, jax.tree.map(projector, params, chosen))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByGaLoreState]:
        del params
        chosen = choose(updates)
        due = state.step % update_proj_gap == 0

        def renewed(g: jax.Array, old: jax.Array, projected: bool) -> jax.Array:
            return jax.lax.cond(due, lambda: _subspace(_tall(g), old.shape[1]), lambda: old) if projected else old

        def down(g: jax.Array, p: jax.Array, projected: bool) -> jax.Array:
            return _tall(g) @ p if projected else g

        def up(n: jax.Array, p: jax.Array, g: jax.Array, projected: bool) -> jax.Array:
            if not projected:
                return n
            whole = scale * (n @ p.T)
            return whole if whole.shape == g.shape else whole.T

        projector = jax.tree.map(renewed, updates, state.projector, chosen)
        low = jax.tree.map(down, updates, projector, chosen)
        adapted: Any = adam.update(low, optax.ScaleByAdamState(state.step, state.mu, state.nu))
        moves, after = adapted
        full = jax.tree.map(up, moves, projector, updates, chosen)
        return full, ScaleByGaLoreState(after.count, after.mu, after.nu, projector)

    return optax.GradientTransformation(init, update)


def _tall(g: jax.Array) -> jax.Array:
    return g if g.shape[0] >= g.shape[1] else g.T


def _subspace(g: jax.Array, rank: int) -> jax.Array:
    """The first right singular vectors of g [l, s], as [s, rank]; the largest entry of each is positive."""
    vectors = jnp.linalg.svd(g, full_matrices=False)[2][:rank].T
    largest = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=0, keepdims=True), axis=0)
    return vectors * jnp.where(largest < 0, -1, 1).astype(vectors.dtype)


def galore(
    learning_rate: optax.ScalarOrSchedule,
    choose: Choose,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """GaLore (Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", arXiv 2403.03507).

    For a matrix of the sides s ≤ l, with gradient G [l, s] (or its transpose) and rate η::

        P ← the first `rank` right singular vectors of G, [s, rank], at the steps 0, update_proj_gap, …
        R = G·P;   N = Adam's direction for R
        θ ← θ − η·( scale·N·Pᵀ + weight_decay·θ )

    What `choose` does not choose is updated by AdamW. The shorter side is projected, as in the authors' code. A stack
    of matrices must go through `wrappers.per_layer`.

    State in float32: 4·(2·l + s)·rank bytes for a matrix, 8 bytes per entry of all else.

    Args:
        learning_rate: η, a number or an optax schedule of the 0-based step.
        choose: function of the parameters that returns a tree of booleans: the matrices to project.
        rank: dimensions of the subspace.
        update_proj_gap: updates between projections: each is a singular value decomposition of every matrix's gradient.
        scale: what the update of a matrix is multiplied by, besides the rate.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added outside the root.
        weight_decay: decoupled, multiplied by the rate.
        mask: tree of booleans (or a function of the parameters that returns one): the leaves that decay;
            None = all.
    """
    return in_float32(
        optax.chain(
            scale_by_galore(choose, rank, update_proj_gap, scale, b1, b2, eps),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
