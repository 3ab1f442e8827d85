"""Norm, rotary embedding, attention and feed-forward layer against torch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxllm.core.mesh import Layout
from jaxllm.kernels.attention import attend, causal_mask
from jaxllm.nn.context import Context
from jaxllm.nn.head import Head
from jaxllm.nn.mlp import ACTIVATIONS, GatedMLP
from jaxllm.nn.norm import LayerNorm, RMSNorm
from jaxllm.nn.rope import Rotation, apply_rope, document_lengths, rope_tables

# One layer in float64 on both sides: only the order of sums differs.
DOUBLE = dict(rtol=1e-12, atol=1e-13)
# Half a unit in the last place of bfloat16's 8 bits.
BFLOAT16 = 2.0**-8


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def test_rms_norm_is_that_of_torch(double):
    x, scale = normal(0, 3, 5, 16) * 1e-2, normal(1, 16)
    ours = RMSNorm(1e-4).apply({"params": {"scale": scale}}, x)
    theirs = torch.nn.functional.rms_norm(torch.tensor(x), (16,), torch.tensor(scale), 1e-4)
    np.testing.assert_allclose(ours, theirs.numpy(), **DOUBLE)


def test_a_scale_around_one_starts_at_one(double):
    x, scale = normal(0, 3, 5, 16), normal(1, 16)
    norm = RMSNorm(1e-4, around_one=True)
    assert not norm.init(jax.random.key(0), x)["params"]["scale"].unbox().any()
    plain = RMSNorm(1e-4).apply({"params": {"scale": 1 + scale}}, x)
    np.testing.assert_array_equal(norm.apply({"params": {"scale": scale}}, x), plain)


@pytest.mark.parametrize("use_bias", [True, False])
def test_layer_norm_is_that_of_torch(double, use_bias):
    x, scale, bias = 3 + normal(0, 3, 5, 16) * 1e-2, normal(1, 16), normal(2, 16)
    ours = LayerNorm(1e-4, use_bias).apply({"params": {"scale": scale, **({"bias": bias} if use_bias else {})}}, x)
    given = torch.tensor(bias) if use_bias else None
    theirs = torch.nn.functional.layer_norm(torch.tensor(x), (16,), torch.tensor(scale), given, 1e-4)
    np.testing.assert_allclose(ours, theirs.numpy(), **DOUBLE)


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_scaled_and_then_capped(double, tied):
    x, table = normal(0, 3, 5, 16), normal(1, 40, 16)
    head = Head(40, 0.02, tied, scale=0.5, soft_cap=3.0)
    params = {} if tied else {"kernel": table.T}
    z = head.apply({"params": params}, x, {"table": table})
    np.testing.assert_allclose(z, 3 * np.tanh(x @ table.T / 2 / 3), **DOUBLE)


def test_rms_norm_of_bfloat16_is_rounded_once():
    """10,000 squares of one would add up to 256 in bfloat16, and 300² overflows float16."""
    for dtype, size in ((jnp.bfloat16, 1.0), (jnp.float16, 300.0)):
        x = jnp.full((1, 10_000), size, dtype)
        y = RMSNorm(0.0).apply({"params": {"scale": jnp.full(10_000, 1.7, dtype)}}, x)
        assert y.dtype == dtype
        np.testing.assert_allclose(np.asarray(y, float), float(jnp.asarray(1.7, dtype)), rtol=BFLOAT16)


def test_rotation_is_that_of_transformers():
    """In float32, as there: an angle of position p is exact to p·2⁻²³, and turns a value by as much."""
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, rope_theta=5e5)
    positions = np.array([[0, 1, 2, 3, 4], [7, 8, 0, 500, 1000]], np.int32)
    q, k = normal(0, 2, 5, 4, 8).astype(np.float32), normal(1, 2, 5, 2, 8).astype(np.float32)
    cos, sin = LlamaRotaryEmbedding(config)(torch.tensor(q), torch.tensor(positions))
    theirs = apply_rotary_pos_emb(*(torch.tensor(a).transpose(1, 2) for a in (q, k)), cos, sin)
    tables = rope_tables(positions, Rotation(8, 5e5, 2048), jnp.bfloat16)
    assert {table.dtype.name for table in tables} == {"float32"}
    atol = 4 * 1000 * 2.0**-23
    for ours, rotated in zip((q, k), theirs, strict=True):
        turned = apply_rope(jnp.asarray(ours), tables)
        np.testing.assert_allclose(turned, rotated.transpose(1, 2).numpy(), rtol=0, atol=atol)
        np.testing.assert_array_equal(turned[:, 0][0], ours[:, 0][0])  # position 0 turns nothing


def test_rotation_depends_on_distance_alone(double):
    q, k = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def product(at: int, other: int) -> float:
        turned = [
            apply_rope(x, rope_tables(np.array([[p]]), Rotation(8, 1e4, 2048), jnp.float64))
            for x, p in ((q, at), (k, other))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(product(5, 2), product(1003, 1000), rtol=1e-10)
    assert abs(product(5, 2) - product(5, 3)) > 1e-3


def test_attention_is_that_of_torch(double):
    """Two query heads read each of two key heads; any mask that leaves every query a key."""
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 7, 2, 8), normal(2, 2, 7, 2, 8)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.4
    mask[..., 0] |= ~mask.any(-1)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(a).transpose(1, 2) for a in (q, k, v)),
        attn_mask=torch.tensor(mask)[:, None],
        enable_gqa=True,
    )
    np.testing.assert_allclose(attend(q, k, v, mask), theirs.transpose(1, 2).numpy(), **DOUBLE)


@pytest.mark.optimized
def test_what_is_masked_has_no_weight_at_all():
    """Keys and values a query may not look at leave its bits alone, however large they are."""
    q, k, v = (normal(i, 1, 4, 2, 8).astype(np.float32) for i in range(3))
    mask = np.tri(4, dtype=bool)[None]
    other_k, other_v = k.copy(), v.copy()
    other_k[:, 2:], other_v[:, 2:] = 100.0, 1e30
    run = jax.jit(attend)
    plain, other = np.asarray(run(q, k, v, mask)), np.asarray(run(q, other_k, other_v, mask))
    assert plain[:, :2].tobytes() == other[:, :2].tobytes()
    assert (plain[:, 2:] != other[:, 2:]).all()


def test_scores_of_bfloat16_are_accumulated_in_float32():
    """The softmax sees scores that were not rounded to 8 bits: the weights' and the result's rounding remains."""
    q, k, v = (jnp.asarray(4 * normal(i, 1, 6, 1, 64), jnp.bfloat16) for i in range(3))
    mask = np.tri(6, dtype=bool)[None]
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(np.asarray(a, float)).transpose(1, 2) for a in (q, k, v)), attn_mask=torch.tensor(mask)[:, None]
    )
    ours = np.asarray(attend(q, k, v, mask), float)
    largest = np.abs(np.asarray(v, float)).max()
    np.testing.assert_allclose(ours, exact.transpose(1, 2).numpy(), rtol=0, atol=2 * BFLOAT16 * largest)


def test_a_token_sees_the_earlier_ones_of_its_segment():
    segments = np.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]], np.int32)
    expected = [
        [[key <= query and row[key] == row[query] for key in range(6)] for query in range(6)] for row in segments
    ]
    np.testing.assert_array_equal(causal_mask(jnp.asarray(segments), 0, 6), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name, double):
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), ACT2FN[name](torch.tensor(x)).numpy(), **DOUBLE)


def test_feed_forward_is_that_of_transformers(double):
    config = LlamaConfig(hidden_size=12, num_attention_heads=2, intermediate_size=20, hidden_act="gelu", mlp_bias=True)
    theirs, x = LlamaMLP(config).double(), normal(0, 2, 3, 12)
    params = {
        name: {
            "kernel": getattr(theirs, f"{name}_proj").weight.detach().numpy().T,
            "bias": getattr(theirs, f"{name}_proj").bias.detach().numpy(),
        }
        for name in ("gate", "up", "down")
    }
    ctx = Context(Layout.single(), rope_tables(np.zeros((2, 3)), Rotation(2, 1e4, 2048), jnp.float64))
    ours = GatedMLP(20, "gelu", True, 0.02, jnp.float64).apply({"params": params}, x, ctx)
    np.testing.assert_allclose(ours, theirs(torch.tensor(x)).detach().numpy(), **DOUBLE)


def test_the_length_of_a_document_is_its_own():
    """Whatever the ids of the documents are, and in whatever order they stand."""
    segments = np.array([[7, 7, 7, -2, -2, 0, 7], [1, 1, 2, 2, 2, 2, 2]], np.int32)
    positions = np.array([[0, 1, 2, 0, 1, 0, 3], [0, 1, 0, 1, 2, 3, 4]], np.int32)
    lengths = document_lengths(jnp.asarray(positions), jnp.asarray(segments))
    np.testing.assert_array_equal(lengths, [[4, 4, 4, 2, 2, 1, 4], [2, 2, 5, 5, 5, 5, 5]])
    np.testing.assert_array_equal(document_lengths(jnp.asarray(positions), None), [[4], [5]])
