"""Dropout: what it drops, and what that does not depend on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import FAMILIES
from jaxllm.models.stack import loop, scan
from jaxllm.nn.dropout import Dropout
from tests.support.families import draw_params, mesh_layout, on_layout, small_lm

RATE = 0.3


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def test_the_share_and_the_scale():
    x = jnp.full((16, 64, 64), 2.0, jnp.bfloat16)
    dropped = Dropout(RATE, keys(16))(x)
    assert dropped.dtype == jnp.bfloat16
    kept = np.asarray(dropped != 0)
    assert set(np.unique(np.asarray(dropped, np.float32))) == {0.0, float(jnp.bfloat16(2) / jnp.bfloat16(1 - RATE))}
    # Six standard deviations of a mean of so many coins.
    assert abs(kept.mean() - (1 - RATE)) < 6 * np.sqrt(RATE * (1 - RATE) / x.size)
    sequences = kept.reshape(16, -1)
    assert len({row.tobytes() for row in sequences}) == 16


def test_places_and_sequences_draw_separately():
    x = jnp.ones((2, 32, 32))
    dropout = Dropout(RATE, keys(2))
    first, again, other = (np.asarray(dropout.at(place)(x)) for place in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert 0.3 < (first == other).mean() < 0.7  # independent masks agree at 1 - 2 · 0.3 · 0.7 = 0.58
    # A sequence has its mask in whatever batch it stands.
    alone = replace(dropout, keys=dropout.keys[1:]).at(0)(x[1:])
    np.testing.assert_array_equal(alone[0], first[1])


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
    lm = replace(small_lm(FAMILIES["llama"].config(**sizes)), dropout=RATE)
    return lm, draw_params(lm)


def batch(rows: int, seed: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, 50, (rows, 8)), jnp.int32)
    return {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=1),
        "positions": jnp.broadcast_to(jnp.arange(8), tokens.shape),
        "segments": jnp.ones_like(tokens),
        "loss_mask": jnp.ones(tokens.shape, jnp.float32),
        "dropout_keys": keys(rows, seed),
    }


def test_every_sublayer_of_every_layer_is_dropped(model):
    """With all else written out by hand: masks of the embedding, of attention, of the feed-forward layer."""
    lm, params = model
    micro = batch(2)
    ctx = lm.batch_context(micro)
    plain = replace(ctx, dropout=None)
    dropout = Dropout(RATE, micro["dropout_keys"])
    x = dropout.at(0)(lm.embed(params, micro["tokens"], plain))
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        silent = jax.tree.map(jnp.zeros_like, layer["mlp"]["down"])
        attended, *_ = lm.block({**layer, "mlp": {**layer["mlp"], "down": silent}}, x, plain)
        x = x + dropout.at(i + 1).at(0)(attended - x)
        silent = jax.tree.map(jnp.zeros_like, layer["attn"]["o"])
        fed, *_ = lm.block({**layer, "attn": {**layer["attn"], "o": silent}}, x, plain)
        x = x + dropout.at(i + 1).at(1)(fed - x)
    ours, *_ = lm.hidden(params, micro["tokens"], ctx)
    np.testing.assert_allclose(ours, x, atol=1e-5 * float(jnp.abs(x).max()))


@pytest.mark.parametrize("stack", [loop(), scan("full"), scan("dots", unroll="all")], ids=["loop", "full", "dots"])
def test_what_is_computed_again_is_dropped_alike(stack, model):
    with jax.enable_x64(True):  # two programs that mean the same (DESIGN, section 5)
        lm = small_lm(model[0].config, dtype="float64")
        lm, params, micro = replace(lm, dropout=RATE), draw_params(lm), batch(4)
        ours, theirs = (jax.grad(lambda p, s=s: lm.losses(p, micro, s).objective)(params) for s in (stack, scan()))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max()), ours, theirs)


def test_a_mesh_drops_the_same(model):
    lm, params = model
    micro = batch(8)
    alone = jax.jit(lm.losses)(params, micro).objective
    moved, shared = on_layout(lm, mesh_layout(fsdp=4, tensor=2), params)
    np.testing.assert_allclose(jax.jit(moved.losses)(shared, micro).objective, alone, rtol=1e-6)
    other = jax.jit(lm.losses)(params, {**micro, "dropout_keys": keys(8, 1)}).objective
    none = jax.jit(lm.losses)(params, {name: a for name, a in micro.items() if name != "dropout_keys"}).objective
    assert len({round(float(loss), 3) for loss in (alone, other, none)}) == 3
