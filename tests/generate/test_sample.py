"""Which tokens can be drawn, and how often they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
)

from jaxllm.core.errors import UserError
from jaxllm.generate.sample import Sampling, draw, narrowed, penalised

LOGITS = np.random.default_rng(0).standard_normal((8, 50)).astype(np.float32) * 3


KEYS = jax.random.split(jax.random.key(0), len(LOGITS))

WAYS = [
    {"top_k": 5},
    {"top_p": 0.7},
    {"top_k": 10, "top_p": 0.5},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"top_p": 1.0},
    {"top_k": 80, "top_p": 0.99},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.0},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    {},
]


@pytest.fixture(scope="module")
def processors():
    """Those of transformers, in its order, as `generate` puts them together."""
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))

    def make(**options):
        config = GenerationConfig(do_sample=True, **{"top_k": None, **options})
        return model._get_logits_processor(config, device="cpu")

    return make


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_same_tokens_as_in_transformers(temperature, way, processors):
    seen = np.random.default_rng(1).integers(0, 50, (8, 12))
    options = {"temperature": temperature, "repetition_penalty": 1.3, **way}
    wanted = processors(**options)(torch.tensor(seen), torch.tensor(LOGITS))
    sampling = Sampling(**options)
    mask = np.zeros((8, 50), bool)
    np.put_along_axis(mask, seen, True, axis=1)
    ours = np.asarray(narrowed(penalised(jnp.asarray(LOGITS), mask, 1.3), sampling))
    assert np.array_equal(np.isfinite(ours), np.isfinite(wanted.numpy()))
    # The same probabilities: float32 rounding of logits of size ten.
    np.testing.assert_allclose(
        jax.nn.softmax(ours, axis=-1), torch.softmax(wanted, dim=-1).numpy(), rtol=2e-5, atol=1e-8
    )


def test_the_order_matters():
    """Else the comparison with transformers could not tell a wrong one."""
    logits = jnp.asarray(LOGITS)
    mask = np.random.default_rng(1).random((8, 50)) < 0.3
    first = narrowed(penalised(logits, mask, 1.3), Sampling(0.3, top_k=20, top_p=0.9, min_p=0.02))
    later = penalised(narrowed(logits, Sampling(0.3, top_k=20, top_p=0.9, min_p=0.02)), mask, 1.3)
    assert not np.array_equal(np.isfinite(first), np.isfinite(later))


@pytest.mark.parametrize("penalty", [1.5, 0.7])
def test_the_repetition_penalty_is_that_of_transformers_and_counts_without_sampling_too(penalty):
    seen = np.random.default_rng(1).integers(0, 50, (8, 12))
    seen[:, 0] = LOGITS.argmax(-1)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(seen), torch.tensor(LOGITS)).numpy()
    mask = np.zeros((8, 50), bool)
    np.put_along_axis(mask, seen, True, axis=1)
    np.testing.assert_allclose(penalised(jnp.asarray(LOGITS), jnp.asarray(mask), penalty), wanted, rtol=1e-6)
    greedy = draw(jnp.asarray(LOGITS), KEYS, Sampling(repetition_penalty=penalty), jnp.asarray(mask))
    assert np.array_equal(greedy, wanted.argmax(-1))
    assert np.array_equal(greedy, LOGITS.argmax(-1)) == (penalty < 1)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.7, top_k=6), Sampling(1.3, top_p=0.8), Sampling(min_p=0.1, temperature=2.0)],
    ids=str,
)
def test_frequencies_follow_the_probabilities(sampling):
    draws = 20_000
    logits = jnp.asarray(LOGITS[:1, :12])
    expected = np.asarray(jax.nn.softmax(narrowed(logits, sampling), axis=-1))[0].astype(np.float64)
    tokens = draw(jnp.tile(logits, (draws, 1)), jax.random.split(jax.random.key(0), draws), sampling)
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert counts[expected == 0].sum() == 0
    kept = expected * draws > 5  # the test's own condition
    rest = np.append(counts[kept], counts[~kept].sum()), np.append(expected[kept], expected[~kept].sum())
    observed, wanted = (side[: kept.sum() + bool(rest[1][-1])] for side in rest)
    assert scipy.stats.chisquare(observed, wanted / wanted.sum() * draws).pvalue > 0.01


def test_temperature_zero_takes_the_most_likely():
    assert np.array_equal(draw(jnp.asarray(LOGITS), KEYS, Sampling()), LOGITS.argmax(-1))


def test_a_tiny_temperature_does_not_overflow():
    tokens = draw(jnp.asarray(LOGITS * 1e30), KEYS, Sampling(1e-30))
    assert np.array_equal(tokens, LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0,), "temperature must be at least 0"),
        ((float("nan"),), "temperature must be at least 0"),
        ((1.0, 0), "top_k must be at least 1, got 0"),
        ((1.0, None, 0.0), "top_p must be above 0"),
        ((1.0, None, 1.5), "at most 1, got 1.5"),
        ((1.0, None, None, 1.1), "min_p must be from 0 to 1, got 1.1"),
        ((1.0, None, None, None, 0.0), "repetition_penalty must be above 0 .* got 0.0"),
        ((0.0, 5), "top_k 5: .* temperature 0 takes the most likely"),
        ((0.0, None, 0.5, 0.1), "top_p 0.5 and min_p 0.1: "),
    ],
)
def test_values_that_mean_nothing(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(*values)
