"""Real trained weights: the values that transformers computed for them, by `reference.json` beside each model."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import load_hf
from jaxllm.nn.context import CachePosition

MODELS = ["stories260K", "stories3M", "tinystories-656k", "tinystories-656k-bf16"]


def plain_tier(*names):
    """The other models have their text read and written in the full tier."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.full) for name in MODELS]


pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def opened(shared):
    """`name -> (lm, params, reference)`, in float32 whatever the file has."""
    models = {}

    def load(name):
        if name not in models:
            folder = shared / "models" / name
            reference = json.loads((folder / "reference.json").read_text())
            models[name] = (*load_hf(folder, param_dtype="float32"), reference)
        return models[name]

    return load


@pytest.mark.parametrize("name", MODELS)
def test_the_largest_logits(name, opened):
    lm, params, reference = opened(name)
    logits = np.asarray(jax.jit(lm.logits)(params, jnp.array([reference["prompt_ids"]])))[0, -1]
    ids, values = zip(*reference["last_position_top10_logits"], strict=True)
    assert tuple(np.argsort(-logits)[:10]) == ids
    # The reference has five decimals.
    np.testing.assert_allclose(logits[list(ids)], values, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", plain_tier("stories260K", "tinystories-656k"))
def test_the_greedy_text(name, opened):
    """Decoded token by token through the key-value cache."""
    lm, params, reference = opened(name)
    prompt, expected = reference["prompt_ids"], reference["greedy_new_ids"]
    slots = len(prompt) + len(expected)

    def forward(tokens, offset, cache):
        length = tokens.shape[1]
        positions = offset + jnp.arange(length)[None]
        segments = (jnp.arange(slots)[None] < offset + length).astype(jnp.int32)
        ctx = lm.context(positions, cache=CachePosition(offset, segments))
        x, _, cache = lm.hidden(params, tokens, ctx, cache=cache)
        return jnp.argmax(lm.head(params, x[:, -1:]), axis=-1).astype(jnp.int32), cache

    @jax.jit
    def decode(token, cache):
        def step(carry, offset):
            token, cache = forward(*carry[:1], offset, carry[1])
            return (token, cache), token[0, 0]

        return jax.lax.scan(step, (token, cache), jnp.arange(len(prompt), slots - 1))[1]

    first, cache = jax.jit(forward)(jnp.array([prompt]), jnp.int32(0), lm.new_cache(1, slots))
    assert [int(first[0, 0]), *decode(first, cache).tolist()] == expected


@pytest.mark.parametrize("name", plain_tier("tinystories-656k"))
def test_the_perplexity_of_held_out_text(name, opened, shared):
    from transformers import AutoTokenizer

    lm, params, reference = opened(name)
    held_out = reference["held_out"]
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    lines = (shared / held_out["file"]).read_text().splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"][:512] for line in lines]
    assert len(rows) == held_out["records"]
    assert sum(len(row) - 1 for row in rows) == held_out["tokens"]

    @jax.jit
    def nll(tokens, lengths):
        z = jax.nn.log_softmax(lm.logits(params, tokens))[:, :-1]
        each = -jnp.take_along_axis(z, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(jnp.arange(tokens.shape[1] - 1) < lengths[:, None] - 1, each, 0))

    total, batch = 0.0, 4
    rows.sort(key=len)
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        # Few lengths, so few programs.
        length = next(n for n in (192, 320, 512) if len(part[-1]) <= n)
        tokens = np.zeros((batch, length), np.int32)
        for i, row in enumerate(part):
            tokens[i, : len(row)] = row
        total += float(nll(tokens, np.array([len(row) for row in part] + [1] * (batch - len(part)))))
    mean = total / held_out["tokens"]
    assert mean == pytest.approx(held_out["nll_per_token"], abs=1e-5)
    assert math.exp(mean) == pytest.approx(held_out["perplexity"], rel=1e-4)


def test_both_files_of_the_tied_model_hold_the_same_weights(opened):
    """One keeps the tied matrix as `lm_head.weight` in float32, the other as `model.embed_tokens.weight` in bf16."""
    (first, a, _), (second, b, _) = opened("tinystories-656k"), opened("tinystories-656k-bf16")
    assert "lm_head.weight" in first.source.tensors
    assert "model.embed_tokens.weight" in second.source.tensors
    jax.tree.map(np.testing.assert_array_equal, a, b)
