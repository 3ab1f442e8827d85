"""Every kind of rotary embedding in a whole model: against transformers, packed, and decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from pydantic import ValidationError

from jaxllm.models import FAMILIES
from jaxllm.nn.context import CachePosition, Context
from jaxllm.nn.rope import ROPES
from tests.support.families import draw_params, small_lm, transformers_model

# Logits of standard deviation 1 to 3 in float32 (DESIGN, section 5).
TOLERANCE = 1e-4
ORIGINAL, WITHIN, BEYOND = 16, 12, 48

LONG = {
    "short_factor": (1.0, 1.1, 1.3, 1.7),
    "long_factor": (1.0, 2.0, 3.0, 8.0),
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL, "beta_fast": 2.0, "beta_slow": 0.2}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 0.2, "high_freq_factor": 1.5, "original_max_position_embeddings": ORIGINAL}
# Case → kind, its fields, and values that each must give other logits.
CASES = {
    "default": ("default", {}, []),
    "linear": ("linear", {"factor": 4.0}, [{"factor": 3.0}]),
    "dynamic": ("dynamic", {"factor": 4.0}, [{"factor": 2.0}]),
    "llama3": (
        "llama3",
        LLAMA3,
        [
            {"factor": 4.0},
            {"low_freq_factor": 0.5},
            {"high_freq_factor": 2.5},
            {"original_max_position_embeddings": 24},
        ],
    ),
    "yarn": (
        "yarn",
        YARN,
        [
            {"factor": 3.0},
            {"original_max_position_embeddings": 128},
            {"beta_fast": 0.5},
            {"beta_slow": 0.05},
            {"truncate": False},
            {"attention_factor": 1.5},
        ],
    ),
    "yarn, scaled": (
        "yarn",
        {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False},
        [{"mscale": 1.0}, {"mscale_all_dim": 1.0}, {"truncate": True}],
    ),
    "yarn, one scale": ("yarn", {**YARN, "mscale": 2.0}, [{"mscale_all_dim": 1.0}]),
    "yarn, given": ("yarn", {**YARN, "attention_factor": 0.8, "mscale": 2.0, "mscale_all_dim": 1.0}, []),
    "longrope": (
        "longrope",
        LONG,
        [
            {"long_factor": (1.0, 2.0, 3.0, 4.0)},
            {"original_max_position_embeddings": 64},
            {"factor": 8.0},
            {"attention_factor": 1.5},
        ],
    ),
    "longrope, scaled": ("longrope", {**LONG, "factor": 8.0}, [{"factor": 2.0}]),
    "longrope, given": ("longrope", {**LONG, "attention_factor": 0.9}, []),
    "proportional": (
        "proportional",
        {"partial_rotary_factor": 0.5, "factor": 2.0},
        [{"partial_rotary_factor": 0.75}, {"factor": 3.0}],
    ),
}


def config_of(kind, fields, **other):
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_theta": 100.0,  # every pair turns within the tests' lengths
        "max_position_embeddings": ORIGINAL if kind == "dynamic" else 64,
    }
    return FAMILIES["llama"].config(**{**sizes, **other}, rope=ROPES[kind](**fields))


def tokens_of(length, batch=2):
    return np.random.default_rng(length).integers(0, 61, (batch, length), dtype=np.int32)


@pytest.fixture(scope="module")
def params():
    return draw_params(small_lm(config_of("default", {})), 1)


@pytest.fixture(scope="module")
def model_of(params, tmp_path_factory):
    return lambda config: transformers_model(config, params, tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def body(params):
    """Logits of rotation tables: one program for every rope."""
    lm = small_lm(config_of("default", {}))

    @jax.jit
    def logits(tokens, tables):
        return lm.head(params, lm.hidden(params, tokens, Context(lm.layout, tables))[0])

    def run(config, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return np.asarray(logits(tokens, small_lm(config).context(positions).rope))

    return run


def theirs_of(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers_and_every_field_matters(case, model_of, body):
    """Within the original length and beyond it; the longer text first, so that a state left behind would show."""
    kind, fields, changes = CASES[case]
    model = model_of(config_of(kind, fields))
    for length in (BEYOND, WITHIN):
        theirs, ours = theirs_of(model, tokens_of(length)), body(config_of(kind, fields), tokens_of(length))
        assert theirs.std() >= 1, "logits too small for the tolerance to mean anything"
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    theirs = theirs_of(model, tokens_of(BEYOND))
    wrongs = [config_of(kind, {**fields, **change}) for change in changes] + [
        config_of(kind, fields, rope_theta=150.0),
        config_of("linear", {"factor": 2.0}),
    ]
    if kind == "dynamic" or case == "longrope":
        wrongs.append(config_of(kind, fields, max_position_embeddings=32))
    if case == "longrope":
        within = body(config_of(kind, {**fields, "short_factor": (1.0, 1.0, 1.0, 1.0)}), tokens_of(WITHIN))
        assert np.abs(within - ours).max() > 100 * TOLERANCE
    misses = {str(wrong.rope): float(np.abs(body(wrong, tokens_of(BEYOND)) - theirs).max()) for wrong in wrongs}
    assert {wrong: miss for wrong, miss in misses.items() if miss < 100 * TOLERANCE} == {}


def test_every_kind_and_every_field_is_in_the_table():
    cases = [
        (kind, {*fields, *(name for change in changes for name in change)}) for kind, fields, changes in CASES.values()
    ]
    for kind in ROPES:
        named = set[str]().union(*(names for other, names in cases if other == kind))
        assert named == set(ROPES[kind].model_fields) - {"type"}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def double_lm(case, **other):
    kind, fields, _ = CASES[case]
    lm = small_lm(config_of(kind, fields, **other), dtype="float64")
    return lm, draw_params(lm, 1)


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * np.abs(np.asarray(theirs)).max())


@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_a_document_has_its_own_length_packed_and_in_a_batch(case, double):
    """One row holds a document beyond the original length and one within; both are what they are alone."""
    lm, params = double_lm(case)
    run = jax.jit(lm.logits)
    long, short = tokens_of(24, 1), tokens_of(10, 1)
    packed = np.concatenate([short, long], axis=1)
    positions = np.array([[*range(10), *range(24)]], np.int32)
    segments = np.array([[1] * 10 + [2] * 24], np.int32)
    logits = run(params, packed, positions=positions, segments=segments)
    assert_same(logits[:, 10:], run(params, long))
    assert_same(logits[:, :10], run(params, short))
    rows = np.concatenate([np.pad(short, ((0, 0), (0, 14))), long])
    positions = np.stack([np.minimum(np.arange(24), 9), np.arange(24)]).astype(np.int32)
    assert_same(run(params, rows, positions=positions)[0, :10], run(params, short)[0])


def decoded(lm, params, tokens, prompt):
    """The logits of `tokens` when `prompt` of them are prefilled and the others follow one by one."""

    @jax.jit
    def part(tokens, positions, offset, segments, cache):
        x, _, cache = lm.hidden(
            params, tokens, lm.context(positions, cache=CachePosition(offset, segments)), cache=cache
        )
        return lm.head(params, x), cache

    batch, length = tokens.shape
    cache, logits = lm.new_cache(batch, length), []
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, length))]:
        segments = np.broadcast_to(np.arange(length) < stop, tokens.shape).astype(np.int32)
        z, cache = part(tokens[:, start:stop], positions[:, start:stop], np.int32(start), segments, cache)
        logits.append(z)
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize(
    ("case", "prompt", "length"),
    [
        ("yarn", 10, 24),
        ("proportional", 10, 24),
        ("dynamic", 10, ORIGINAL),
        ("longrope", 10, ORIGINAL),
        ("longrope", ORIGINAL + 1, 24),
    ],
)
def test_prefill_and_decode_are_the_full_forward_pass(case, prompt, length, double):
    """For the kinds that know the length: as long as what follows does not change the angles of what was before."""
    lm, params = double_lm(case)
    tokens = tokens_of(length)
    assert_same(decoded(lm, params, tokens, prompt), jax.jit(lm.logits)(params, tokens))


@pytest.mark.parametrize("case", ["dynamic", "longrope"])
def test_growing_beyond_the_original_length_decodes_as_transformers_does(case, params, model_of):
    """There no cache gives the full forward pass: earlier keys keep the angles that they were written with."""
    kind, fields, _ = CASES[case]
    config, tokens, prompt = config_of(kind, fields), tokens_of(20), 12
    model = model_of(config)
    with torch.no_grad():
        out = model(torch.tensor(tokens[:, :prompt]).long(), use_cache=True)
        logits = [out.logits]
        for i in range(prompt, 20):
            out = model(torch.tensor(tokens[:, i : i + 1]).long(), past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
    ours = decoded(small_lm(config), params, tokens, prompt)
    np.testing.assert_allclose(ours, torch.cat(logits, 1).numpy(), rtol=0, atol=TOLERANCE)
    full = np.asarray(jax.jit(small_lm(config).logits)(params, tokens))
    assert np.abs(ours - full).max() > 100 * TOLERANCE


def test_wrong_ropes_are_refused():
    with pytest.raises(ValidationError, match="long_factor has 3 numbers and must have 4, one for each pair"):
        config_of("longrope", {**LONG, "long_factor": (1.0, 2.0, 3.0)})
    with pytest.raises(ValidationError, match="high_freq_factor"):
        config_of("llama3", {**LLAMA3, "high_freq_factor": 0.1})
