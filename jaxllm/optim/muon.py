"""Muon for the matrices of the layers, AdamW for all else."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxllm.optim.precision import in_float32

Choose = Callable[[Any], Any]
"""Parameters → a tree of booleans like them: which are matrices for Muon."""


class ScaleByMuonState(NamedTuple):
    """State of `scale_by_muon`: `step`s done, and two trees like the parameters; `nu` is a scalar 0 for a matrix."""

    step: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_muon(
    choose: Choose, beta: float, ns_steps: int, consistent_rms: float | None, b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """The direction of `muon`, without rates and weight decay."""

    def each(matrices: Any) -> Any:
        return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), matrices)

    of_matrices = optax.contrib.scale_by_muon(ns_steps=ns_steps, beta=beta, eps=eps, weight_dimension_numbers=each)
    of_rest = optax.scale_by_adam(b1, b2, eps)

    def scaled(u: jax.Array) -> jax.Array:
        inputs, outputs = u.shape
        return u * (max(1, outputs / inputs) ** 0.5 if consistent_rms is None else max(u.shape) ** 0.5 * consistent_rms)

    def init(params: optax.Params) -> ScaleByMuonState:
        def second(p: jax.Array, chosen: bool) -> jax.Array:
            return jnp.zeros((), p.dtype) if chosen else jnp.zeros_like(p)

        nu = jax.tree.map(second, params, choose(params))
        return ScaleByMuonState(jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params), nu)

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByMuonState]:
        del params
        chosen = choose(updates)

        def matrices(leaves: Any) -> Any:
            return jax.tree.map(lambda leaf, one: leaf if one else None, leaves, chosen)

        def rest(leaves: Any) -> Any:
            return jax.tree.map(lambda leaf, one: None if one else leaf, leaves, chosen)

        start: Any = of_matrices.init(())
        muon_state = start._replace(count=state.step, mu=matrices(state.mu))
        adam_state = optax.ScaleByAdamState(state.step, rest(state.mu), rest(state.nu))
        whitened, muon_after = _update(of_matrices, matrices(updates), muon_state)
        adapted, adam_after = _update(of_rest, rest(updates), adam_state)
        step = jnp.asarray(optax.safe_increment(state.step))
        mu = _together(muon_after.mu, adam_after.mu)
        nu = _together(matrices(state.nu), adam_after.nu)
        return _together(jax.tree.map(scaled, whitened), adapted), ScaleByMuonState(step, mu, nu)

    return optax.GradientTransformation(init, update)


def _update(tx: Any, updates: Any, state: Any) -> Any:
    return tx.update(updates, state)


def _together(*trees: Any) -> Any:
    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    choose: Choose,
    beta: float,
    ns_steps: int,
    consistent_rms: float | None,
    rest_rate: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    *,
    mask: Any,
) -> optax.GradientTransformationExtraArgs:
    """Muon (Jordan et al., "Muon: An optimizer for hidden layers", 2024), by optax's Newton-Schulz iteration.

    For a matrix [in, out] with gradient g and rate η, M̂ being Nesterov's form of M::

        M ← beta·M + (1 − beta)·g
        O ≈ U·Vᵀ for the singular value decomposition M̂ = U·S·Vᵀ, by `ns_steps` steps
        θ ← θ − η·( √max(1, out/in)·O + weight_decay·θ )

    With `consistent_rms` c the factor is c·√max(in, out): the update has an RMS of about c (Liu et al., "Muon is
    Scalable for LLM Training", arXiv 2502.16982, with 0.2), so that rates of AdamW may be taken over. What `choose`
    does not choose is updated by AdamW at the rate rest_rate·η.

    State in float32: 4 bytes per entry of a matrix, 8 of all else. A stack of matrices must go through
    `wrappers.per_layer`.
    """

    def slower(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        return jax.tree.map(lambda u, chosen: u if chosen else rest_rate * u, updates, choose(updates)), state

    return in_float32(
        optax.chain(
            scale_by_muon(choose, beta, ns_steps, consistent_rms, b1, b2, eps),
            optax.add_decayed_weights(weight_decay, mask),
            optax.GradientTransformation(optax.init_empty_state, slower),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
