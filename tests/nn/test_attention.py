"""The attention of a layer: what it learns beside its matrices, and a cache that changes nothing."""

from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.mesh import Layout
from jaxllm.kernels.attention_spec import AttentionSpec
from jaxllm.nn.attention import VIRTUAL, Attention
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import CachePosition, Context, LayerData

HEADS, KV_HEADS, WIDTH, LENGTH = 4, 2, 4, 14


@pytest.mark.parametrize("prefix", [0, 3])
def test_decoding_with_a_cache_is_the_forward_pass(prefix):
    """With a window, a soft cap, sinks and slopes; two rows, the second with padding in front, where both begin with
    a virtual token that has a query. In two passes, of tokens and of one."""
    slopes: Any = np.array([0.5, 0.25, 0.125, 0.0625])
    module = Attention(
        HEADS, KV_HEADS, WIDTH, 0.5, jnp.float32, spec=AttentionSpec(0.6, 1.5, slopes=slopes), sinks=True
    )
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    x = draw(2, LENGTH, 8)
    segments: Any = np.ones((2, LENGTH), np.int32)
    segments[:, 0], segments[1, 1:4] = VIRTUAL, 0
    turned: Any = np.ones((2, LENGTH, WIDTH // 2), np.float32), np.zeros((2, LENGTH, WIDTH // 2), np.float32)
    windows: Any = np.array([99, 5], np.int32)
    ctx = Context(Layout.single(), turned, segments, shared=1, layers=LayerData(window=windows)).of_layer(1)
    params = nn.unbox(jax.jit(module.init)(jax.random.key(1), x, ctx))
    params["params"]["sinks"] = draw(HEADS) + 1
    if prefix:
        params["params"] |= {name: draw(prefix, KV_HEADS * WIDTH) for name in ("prefix_k", "prefix_v")}

    @jax.jit
    def run(x, ctx, cache=None):
        return module.apply(params, x, ctx, cache)

    whole, none = run(x, ctx)
    assert none is None

    slots = 16
    cache = LayerCache(*(np.zeros((2, slots, KV_HEADS, WIDTH), np.float32) for _ in range(2)))  # pyright: ignore
    of_slots = np.pad(segments, ((0, 0), (0, slots - LENGTH)))
    parts = []
    for begin, end in [(0, LENGTH - 1), (LENGTH - 1, LENGTH)]:
        rope = tuple(a[:, begin:end] for a in turned)
        position = CachePosition(np.int32(begin), of_slots)
        y, cache = run(x[:, begin:end], replace(ctx, rope=rope, segments=None, cache=position), cache)
        parts.append(y)
    real = np.asarray(segments) == 1
    np.testing.assert_allclose(np.concatenate(parts, 1)[real], np.asarray(whole)[real], rtol=0, atol=2e-6)

    wide = run(x, replace(ctx, window=np.int32(99)))[0]
    seen = np.abs(np.asarray(wide) - np.asarray(whole)).max((0, 2)) > 1e-4
    assert not seen[: 5 - prefix].any(), "the window shows only where it ends"
    assert seen[6:].all(), "the window shows where it ends"
