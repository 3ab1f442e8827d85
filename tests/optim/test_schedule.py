"""Exact values of the schedules, worked out by hand, and against transformers."""

import jax
import numpy as np
import optax
import pytest
import torch
from transformers import optimization as hf

from jaxllm.optim import schedule


def values(rate: optax.Schedule, steps: int) -> np.ndarray:
    return np.asarray(jax.vmap(rate)(np.arange(steps)))


# A run of 10 steps at peak 2, 4 of them warm-up: step 3 is the first at the peak, step 10 would have the end.
WARMUP = [0.5, 1.0, 1.5, 2.0]
PROGRESS = np.arange(1, 7) / 7


@pytest.mark.parametrize(
    ("rate", "after"),
    [
        (schedule.constant(2.0, 10, 4), [2.0] * 6),
        (schedule.linear(2.0, 10, 4), 2 * (1 - PROGRESS)),
        (schedule.linear(2.0, 10, 4, final=0.1), 2 * (0.1 + 0.9 * (1 - PROGRESS))),
        (schedule.cosine(2.0, 10, 4), 1 + np.cos(np.pi * PROGRESS)),
        (schedule.cosine(2.0, 10, 4, final=0.1), 2 * (0.1 + 0.9 * (1 + np.cos(np.pi * PROGRESS)) / 2)),
        (schedule.wsd(2.0, 10, 4), [2.0] * 6),
        (schedule.wsd(2.0, 10, 4, decay_steps=3), [2.0] * 3 + [2 * (1 - (k / 4) ** 0.5) for k in (1, 2, 3)]),
        (schedule.wsd(2.0, 10, 4, 6, final=0.5), [1 + 1 - (k / 7) ** 0.5 for k in range(1, 7)]),
        (schedule.wsd(2.0, 10, 4, 3, 0.5, "linear"), [2.0] * 3 + [1 + 1 - k / 4 for k in (1, 2, 3)]),
        (schedule.wsd(2.0, 10, 4, 3, 0.0, "cosine"), [2.0] * 3 + [1 + np.cos(np.pi * k / 4) for k in (1, 2, 3)]),
        (schedule.inverse_sqrt(2.0, 10, 4), [2 * (4 / n) ** 0.5 for n in range(5, 11)]),
    ],
)
def test_values_of_a_run(rate: optax.Schedule, after: list[float]) -> None:
    # Float32: a rate near the end is a small difference of numbers of the peak's size.
    np.testing.assert_allclose(values(rate, 10), [*WARMUP, *after], rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize(
    ("rate", "end"),
    [
        (schedule.linear(2.0, 10, 4, final=0.1), 0.2),
        (schedule.cosine(2.0, 10, 4, final=0.1), 0.2),
        (schedule.wsd(2.0, 10, 4, 3, final=0.1), 0.2),
        (schedule.constant(2.0, 10, 4), 2.0),
    ],
)
def test_the_end_is_reached_one_step_after_the_run_and_kept(rate: optax.Schedule, end: float) -> None:
    np.testing.assert_allclose([rate(10), rate(11), rate(1000)], end, rtol=1e-6)


SHAPES = {
    "constant": schedule.constant,
    "linear": schedule.linear,
    "cosine": schedule.cosine,
    "wsd": lambda *args: schedule.wsd(*args, decay_steps=0),
    "inverse_sqrt": schedule.inverse_sqrt,
}


@pytest.mark.parametrize("name", SHAPES)
def test_no_step_is_wasted_and_the_peak_is_reached(name: str) -> None:
    for total, warmup in ((1, 0), (1, 1), (2, 1), (5, 0), (5, 5), (7, 3)):
        rates = values(SHAPES[name](1.0, total, warmup), total)
        assert rates.min() > 0, (total, warmup)
        assert rates[max(warmup - 1, 0)] == rates.max() == 1.0, (total, warmup)


def test_traced_and_plain_steps_agree() -> None:
    rate = schedule.cosine(3e-4, 1000, 30, 0.1)
    assert float(rate(500)) == float(jax.jit(rate)(500))
    with jax.enable_x64(True):
        assert jax.jit(rate)(500).dtype == "float64"


@pytest.mark.parametrize("name", SHAPES)
def test_warmup_longer_than_the_run_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=11.*total_steps=10"):
        SHAPES[name](1.0, 10, 11)


def test_decay_that_overlaps_the_warmup_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps=5 and decay_steps=6"):
        schedule.wsd(1.0, 10, 5, 6)


# Ours, and the schedule of transformers for the same numbers of warm-up, decay and total steps.
THEIRS = {
    "constant": (
        lambda w, d, t: schedule.constant(1.0, t, w),
        lambda o, w, d, t: hf.get_constant_schedule_with_warmup(o, w),
    ),
    "linear": (
        lambda w, d, t: schedule.linear(1.0, t, w),
        lambda o, w, d, t: hf.get_linear_schedule_with_warmup(o, w, t),
    ),
    "cosine": (
        lambda w, d, t: schedule.cosine(1.0, t, w),
        lambda o, w, d, t: hf.get_cosine_schedule_with_warmup(o, w, t),
    ),
    "cosine to a tenth": (
        lambda w, d, t: schedule.cosine(1.0, t, w, 0.1),
        lambda o, w, d, t: hf.get_cosine_with_min_lr_schedule_with_warmup(o, w, t, min_lr_rate=0.1),
    ),
    "inverse_sqrt": (
        lambda w, d, t: schedule.inverse_sqrt(1.0, t, w),
        lambda o, w, d, t: hf.get_inverse_sqrt_schedule(o, w),
    ),
    **{
        f"wsd {shape}": (
            lambda w, d, t, shape=shape: schedule.wsd(1.0, t, w, d, 0.2, shape),
            lambda o, w, d, t, name=name: hf.get_wsd_schedule(
                o, w, d + 1, num_training_steps=t, decay_type=name, min_lr_ratio=0.2
            ),
        )
        for shape, name in (("sqrt", "1-sqrt"), ("linear", "linear"), ("cosine", "cosine"))
    },
}


# transformers' inverse root divides by its warm-up.
CASES = [(name, warmup) for name in THEIRS for warmup in (0, 1, 7) if (name, warmup) != ("inverse_sqrt", 0)]


@pytest.mark.parametrize(("name", "warmup"), CASES)
def test_the_rates_are_those_of_transformers_one_step_on(name: str, warmup: int) -> None:
    """At step i + 1 of T + 1 where there is a warm-up, and at step i of T where there is none.

    Theirs of wsd has the minimum in its warm-up too, which ours has not.
    """
    steps, decay, later = 30, 6, 1 if warmup or name.startswith("wsd") else 0
    ours, theirs = THEIRS[name]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = theirs(optimizer, warmup, decay, steps + later)
    rates = []
    for _ in range(steps + later):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    first = warmup if name.startswith("wsd") else 0
    np.testing.assert_allclose(values(ours(warmup, decay, steps), steps)[first:], rates[later:][first:], rtol=2e-5)
