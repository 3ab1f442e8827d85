"""Which tokens can be drawn, and how often they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jaxllm.core.errors import UserError
from jaxllm.generate.sample import Sampling, draw, narrowed

LOGITS = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32) * 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, None), (None, 0.7), (10, 0.5), (1, None), (None, 1e-6), (None, 1.0), (80, 0.99)]
)
def test_the_same_tokens_as_in_transformers(temperature, top_k, top_p):
    wanted = TemperatureLogitsWarper(temperature)(None, torch.tensor(LOGITS))  # pyright: ignore
    if top_k is not None:
        wanted = TopKLogitsWarper(top_k)(None, wanted)  # pyright: ignore
    if top_p is not None and top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)  # pyright: ignore
    ours = np.asarray(narrowed(jnp.asarray(LOGITS), Sampling(temperature, top_k, top_p)))
    assert np.array_equal(np.isfinite(ours), np.isfinite(wanted.numpy()))
    # The same probabilities: float32 rounding of logits of size ten.
    np.testing.assert_allclose(
        jax.nn.softmax(ours, axis=-1), torch.softmax(wanted, dim=-1).numpy(), rtol=2e-5, atol=1e-8
    )


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_k=6), Sampling(1.3, top_p=0.8)], ids=str)
def test_frequencies_follow_the_probabilities(sampling):
    draws = 20_000
    logits = jnp.asarray(LOGITS[:1, :12])
    expected = np.asarray(jax.nn.softmax(narrowed(logits, sampling), axis=-1))[0].astype(np.float64)
    tokens = draw(jnp.tile(logits, (draws, 1)), jax.random.key(0), sampling)
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected * draws > 5  # the test's own condition
    rest = np.append(counts[kept], counts[~kept].sum()), np.append(expected[kept], expected[~kept].sum())
    observed, wanted = (side[: kept.sum() + bool(rest[1][-1])] for side in rest)
    assert scipy.stats.chisquare(observed, wanted / wanted.sum() * draws).pvalue > 0.01


def test_temperature_zero_takes_the_most_likely():
    assert np.array_equal(draw(jnp.asarray(LOGITS), jax.random.key(0), Sampling()), LOGITS.argmax(-1))


def test_a_tiny_temperature_does_not_overflow():
    tokens = draw(jnp.asarray(LOGITS * 1e30), jax.random.key(0), Sampling(1e-30))
    assert np.array_equal(tokens, LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0,), "temperature must be at least 0"),
        ((float("nan"),), "temperature must be at least 0"),
        ((1.0, 0), "top_k must be at least 1, got 0"),
        ((1.0, None, 0.0), "top_p must be above 0"),
        ((1.0, None, 1.5), "at most 1, got 1.5"),
        ((0.0, 5), "top_k 5 .* temperature 0 takes the most likely"),
    ],
)
def test_values_that_mean_nothing(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(*values)
