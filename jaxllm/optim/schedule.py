"""Learning rates over a run: optax schedules, functions of the 0-based step i, for a run of known length.

Warm-up is `peak·(i + 1)/warmup_steps`: the first step has `peak/warmup_steps`, the warm-up's last has `peak`.
Linear and cosine go from there, step `w = max(warmup_steps − 1, 0)`, to `final·peak` one step *after* the
run: progress at step i is `(i − w)/(total_steps − w)`, so the last step has a little more than `final·peak`.
Thus no step is wasted on a rate of 0, at either end, and a run of one step has the peak rate. After the run a
schedule stays at its end.

The schedules of transformers begin at 0, so that their first step changes nothing: with a warm-up of W ≥ 1 steps, the
rate of step i in a run of T steps is that of `get_*_schedule_with_warmup` at its step i + 1 of T + 1; without one, at
its step i of T. A wsd decay of D steps is there one of D + 1, of which the last falls after the run.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax


def constant(peak: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Warm-up, then `peak`."""
    return _warmed_up(peak, total_steps, warmup_steps, lambda _: 1.0)


def linear(peak: float, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> optax.Schedule:
    """Warm-up, then a straight line from `peak` to `final·peak`.

    >>> rate = linear(1.0, total_steps=6, warmup_steps=2)
    >>> [round(float(rate(step)), 3) for step in range(6)]
    [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]
    """
    start = _peak_step(warmup_steps)

    def share(step: jax.Array) -> jax.Array:
        return final + (1 - final) * (1 - _progress(step, start, total_steps))

    return _warmed_up(peak, total_steps, warmup_steps, share)


def cosine(peak: float, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> optax.Schedule:
    """Warm-up, then half a cosine from `peak` to `final·peak` (arXiv 1608.03983, eq. 5)."""
    start = _peak_step(warmup_steps)

    def share(step: jax.Array) -> jax.Array:
        return final + (1 - final) * (1 + jnp.cos(jnp.pi * _progress(step, start, total_steps))) / 2

    return _warmed_up(peak, total_steps, warmup_steps, share)


# The share of the way down that is left, by progress p from 0 to 1.
_DECAYS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sqrt": lambda p: 1 - jnp.sqrt(p),
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + jnp.cos(jnp.pi * p)) / 2,
}


def wsd(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    final: float = 0.0,
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt",
) -> optax.Schedule:
    """Warm-up, stable at `peak`, and in the last `decay_steps` steps down towards `final·peak` (arXiv 2404.06395).

    The k-th of these steps has progress `p = k/(decay_steps + 1)` and, of the way, `1 − √p` left (the best form of
    Hägele et al., arXiv 2405.18392), or `1 − p`, or `(1 + cos πp)/2`. Warm-up and decay must fit into the run.
    """
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(f"{warmup_steps=} and {decay_steps=} are together more than {total_steps=}")
    start = total_steps - decay_steps - 1

    def share(step: jax.Array) -> jax.Array:
        return final + (1 - final) * _DECAYS[shape](_progress(step, start, total_steps))

    return _warmed_up(peak, total_steps, warmup_steps, share if decay_steps else lambda _: 1.0)


def inverse_sqrt(peak: float, total_steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """`peak·min((i + 1)/W, √(W/(i + 1)))` with `W = max(warmup_steps, 1)` (arXiv 1706.03762, section 5.3)."""
    scale = max(warmup_steps, 1)
    return _warmed_up(peak, total_steps, warmup_steps, lambda step: jnp.sqrt(scale / (step + 1)))


def _peak_step(warmup_steps: int) -> int:
    return max(warmup_steps - 1, 0)


def _progress(step: jax.Array, start: int, end: int) -> jax.Array:
    return jnp.clip((step - start) / (end - start), 0.0, 1.0)


def _warmed_up(
    peak: float, total_steps: int, warmup_steps: int, share: Callable[[jax.Array], jax.Array | float]
) -> optax.Schedule:
    """After the warm-up `peak·share(step)`. Raises ValueError for a warm-up longer than the run."""
    if not 0 <= warmup_steps <= total_steps or total_steps < 1:
        raise ValueError(f"{warmup_steps=} does not lie in a run of {total_steps=}")

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, dtype=jnp.result_type(float))
        warming = (step + 1) / max(warmup_steps, 1)
        return peak * jnp.where(step < warmup_steps, warming, share(step))

    return schedule
