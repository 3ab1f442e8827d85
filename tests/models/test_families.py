"""Every registered family: against transformers, and against itself executed in other ways."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import tree
from jaxllm.hf import load_hf
from jaxllm.hf.export import save
from jaxllm.hf.weights import weight_table
from jaxllm.models import FAMILIES
from jaxllm.models.fit_layout import fit_layout
from jaxllm.models.gpipe import pipeline
from jaxllm.models.stack import loop, scan
from jaxllm.nn.context import CachePosition
from jaxllm.nn.rope import LinearRope
from tests.support.families import (
    COMPUTED,
    draw_config,
    draw_params,
    mesh_layout,
    on_layout,
    small_lm,
    transformers_model,
)

# Logits of standard deviation 1 to 3 in float32 (DESIGN, section 5).
TOLERANCE = 1e-4

SEEDS = range(36)
LENGTH = 24
# Between them these have every trait: biases, plain and tied heads; windows, caps, norms around 1.
TRAITS = ("llama", "gemma2")


def cells(values, everywhere=1, others=pytest.mark.full):
    """Every family with the first values; the other values, which are about what all families share, with those of
    different traits in the tier `others`, and with the rest in the tables."""

    def tier(family, place):
        return () if place < everywhere else others if family in TRAITS else pytest.mark.tables

    return [
        pytest.param(family, value, marks=tier(family, place), id=f"{family}-{value}")
        for family in COMPUTED
        for place, value in enumerate(values)
    ]


def tokens_of(config, batch=2, length=LENGTH, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length), dtype=np.int32)


def logits_of(lm, params, tokens, **kwargs):
    return np.asarray(jax.jit(lm.logits)(params, tokens, **kwargs))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """`(config, params, tokens) -> (logits, attention weights)` of transformers."""
    import torch

    def run(config, params, tokens):
        model = transformers_model(config, params, tmp_path_factory.mktemp("hf") / "model")
        with torch.no_grad():
            out = model(torch.tensor(tokens).long(), output_attentions=True)
        return out.logits.numpy(), [a.numpy() for a in out.attentions]

    return run


def entropy(weights):
    """The mean entropy of attention rows over that of flat ones, from the fourth row on."""
    rows = np.arange(3, weights.shape[-1])
    bits = -(weights * np.log(np.maximum(weights, 1e-30))).sum(-1)[..., rows]
    return (bits / np.log(rows + 1)).mean()


@pytest.mark.parametrize(("family", "seed"), cells(SEEDS, everywhere=4, others=pytest.mark.tables))
def test_logits_are_those_of_transformers(family, seed, reference):
    config = draw_config(family, seed)
    lm = small_lm(config)
    params = draw_params(lm, seed)
    tokens = tokens_of(config, seed=seed)
    theirs, attentions = reference(config, params, tokens)
    ours = logits_of(lm, params, tokens)
    assert theirs.std() >= 1, "logits too small for the tolerance to mean anything"
    assert all(0.1 < entropy(a) < 0.9 for a in attentions), "attention is flat or looks at one token"
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def interleaved_groups(params, config):
    """Query heads in an order under which head h would look at key head h % K, not h // (H / K)."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    order = np.arange(heads).reshape(kv, heads // kv).T.reshape(-1)
    columns = (order[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)
    axes = {"layers/attn/q/kernel": 2, "layers/attn/q/bias": 1, "layers/attn/o/kernel": 1}
    return tree.map_with_path(lambda path, leaf: jnp.take(leaf, columns, axes[path]) if path in axes else leaf, params)


# What a field becomes on our side only. A dict changes several at once, keeping the shapes of the weights.
CHANGES = {
    "rms_norm_eps": {"rms_norm_eps": 1e-2},
    "rope_theta": {"rope_theta": 1000.0},
    "rope": {"rope": LinearRope(factor=2.0)},  # its own fields: tests/models/test_rope.py
    "num_attention_heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "head_dim": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
    "num_key_value_heads": {},  # interleaved_groups
    "hidden_act": {"hidden_act": "gelu"},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": False},
    "mlp_bias": {"mlp_bias": False},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "sliding_window": {"sliding_window": 6},
    "layer_types": {"layer_types": ("full_attention", "full_attention")},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 121},
    "attn_logit_softcapping": {"attn_logit_softcapping": None},
    "final_logit_softcapping": {"final_logit_softcapping": None},
}
# A wrong size does not fit the file, and the others are no part of the computation.
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"}
INERT = {"max_position_embeddings", "initializer_range", "type"}
# layer_types follows from them.
INERT |= {"use_sliding_window", "max_window_layers"}


@pytest.mark.parametrize("family", COMPUTED)
def test_the_comparison_has_teeth(family, reference):
    """A wrong value of any field misses transformers' logits by at least 100 times the tolerance."""
    switches = {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "hidden_act": "silu"}
    fields = set(FAMILIES[family].config.model_fields)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size": 32}
    numbers = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    windows = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
    caps = {"query_pre_attn_scalar": 64, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}
    fixed = {k: v for k, v in {**switches, **sizes, **numbers, **windows, **caps}.items() if k in fields}
    config = draw_config(family, 0, **fixed)
    lm = small_lm(config)
    params = draw_params(lm, 1)
    tokens = tokens_of(config)
    theirs, _ = reference(config, params, tokens)
    assert fields - SIZES - INERT <= set(CHANGES), "a new field needs a change that this test must notice"

    def wrong(field, change):
        if field == "num_key_value_heads":
            return lm.logits(interleaved_groups(params, config), tokens)
        changed = small_lm(config.model_copy(update=change))
        wanted, leaves = tree.flatten(changed.abstract()), tree.flatten(params)
        # A norm of each head is as wide as that is.
        left = {path: jnp.resize(leaf, wanted[path].shape) for path, leaf in leaves.items() if path in wanted}
        return changed.logits(tree.insert({}, left), tokens)

    changes = {field: change for field, change in CHANGES.items() if field in fields}
    wrongs = jax.jit(lambda: {field: wrong(field, change) for field, change in changes.items()})()
    misses = {field: float(np.abs(logits - theirs).max()) for field, logits in wrongs.items()}
    assert {field: miss for field, miss in misses.items() if miss < 100 * TOLERANCE} == {}
    np.testing.assert_allclose(logits_of(lm, params, tokens), theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", COMPUTED)
def test_axes_and_weight_table_cover_every_parameter(family):
    for seed in SEEDS[:6]:
        lm = small_lm(draw_config(family, seed))
        leaves = tree.flatten(lm.abstract())
        names = jax.tree.flatten_with_path(lm.axes(), is_leaf=lambda leaf: isinstance(leaf, tuple))[0]
        axes = {tree.path_string(path): leaf for path, leaf in names}
        assert {path: len(names) for path, names in axes.items()} == {p: x.ndim for p, x in leaves.items()}
        assert {axis for names in axes.values() for axis in names} <= set(lm.layout.rules)
        assert sorted(rule.path for rule in lm.family.rules(lm.config)) == sorted(leaves)
        keys = [key for entry in weight_table(lm) for key in entry.names]
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(("family", "dtype"), cells(["bfloat16", "float32", "float16"]))
def test_a_checkpoint_comes_back_bit_for_bit(family, dtype, tmp_path):
    """params → files → params. (files → params → files: tests/hf/test_weights.py)"""
    for seed in (0, 1):
        lm = small_lm(draw_config(family, seed), dtype=dtype)
        params = draw_params(lm)
        save(lm, params, tmp_path / str(seed))
        again, loaded = load_hf(tmp_path / str(seed))
        assert again.config == lm.config
        assert again.param_dtype == jnp.dtype(dtype)
        jax.tree.map(np.testing.assert_array_equal, bits(loaded), bits(params))


def bits(params):
    return jax.tree.map(lambda leaf: np.asarray(leaf).view(f"u{leaf.dtype.itemsize}"), params)


@pytest.fixture
def double():
    """float64, in which two programs that mean the same agree to 1e-10 of the largest value (DESIGN, section 5)."""
    with jax.enable_x64(True):
        yield


def double_lm(family, seed, **fixed):
    config = draw_config(family, seed, **fixed)
    lm = small_lm(config, dtype="float64")
    return lm, draw_params(lm, seed)


def assert_same(ours, theirs):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(np.asarray(b)).max())

    jax.tree.map(check, ours, theirs)


def loss_of(lm, stack):
    """The sum of squares of what the stack gives the head, where every block matters."""

    def loss(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, *_ = lm.hidden(params, tokens, lm.context(positions), stack)
        return jnp.mean(jnp.square(lm.head(params, x)))

    return loss


@pytest.mark.parametrize(("family", "remat"), cells(["full", "dots"]))
def test_scan_is_the_loop_in_value_and_gradient(family, remat, double):
    lm, params = double_lm(family, 0)
    tokens = tokens_of(lm.config)
    stack = {"full": scan("full"), "dots": scan("dots", unroll=2)}[remat]
    scanned = jax.jit(jax.value_and_grad(loss_of(lm, stack)))(params, tokens)
    looped = jax.jit(jax.value_and_grad(loss_of(lm, loop())))(params, tokens)
    assert_same(scanned, looped)


STAGES = [dict(pipeline=2, data=2, tensor=2), dict(pipeline=4, fsdp=2), dict(pipeline=2, fsdp=4), dict(pipeline=4)]


@pytest.mark.parametrize(("family", "sizes"), cells(STAGES))
def test_a_pipeline_is_the_loop_in_value_and_gradient(family, sizes, double):
    """Of a vocabulary that its stages pad; also the logits, which need no stack to be named."""
    lm, params = double_lm(family, 0, num_hidden_layers=4, vocab_size=61, num_attention_heads=4, num_key_value_heads=2)
    tokens = tokens_of(lm.config, batch=8, length=6)
    staged, placed = on_layout(lm, mesh_layout(**sizes), params)

    def loss_and_logits(lm, stack):
        def loss(params, tokens):
            logits = lm.logits(params, tokens)
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            x, *_ = lm.hidden(params, tokens, lm.context(positions), stack)
            return jnp.mean(jnp.square(lm.head(params, x)[..., : lm.config.vocab_size])), logits

        return jax.value_and_grad(loss, has_aux=True)

    ours = jax.jit(loss_and_logits(staged, pipeline(staged.layout, "full")))(placed, tokens)
    theirs = jax.jit(loss_and_logits(lm, loop()))(params, tokens)
    (values, grads), (wanted, wanted_grads) = ours, theirs
    assert_same(values, wanted)
    assert_same(jax.tree.map(lambda g, w: g[tuple(map(slice, w.shape))], grads, wanted_grads), wanted_grads)


@pytest.mark.parametrize(("family", "sizes"), cells([dict(), dict(pipeline=2, tensor=2)]))
def test_prefill_and_decode_are_the_full_forward_pass(family, sizes, double):
    """Two rows of different lengths, padded in front, prefilled at once and decoded token by token."""
    lm, params = double_lm(family, 1)
    if sizes:
        lm, params = on_layout(lm, mesh_layout(**sizes), params)
    tokens = tokens_of(lm.config, length=8)
    prompt, slots, padding = 5, 10, np.array([0, 2])
    segments = (np.arange(slots) >= padding[:, None]).astype(np.int32)

    @jax.jit
    def part(params, tokens, positions, offset, segments, cache):
        ctx = lm.context(positions, cache=CachePosition(offset, segments))
        x, _, cache = lm.hidden(params, tokens, ctx, cache=cache)
        return lm.head(params, x)[..., : lm.config.vocab_size], cache

    shifted = np.stack([np.roll(row, pad) for row, pad in zip(tokens, padding, strict=True)])
    positions = np.maximum(np.arange(8) - padding[:, None], 0)
    cache, logits = lm.new_cache(2, slots), []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, 8))]:
        here = segments * (np.arange(slots) < stop)
        z, cache = part(params, shifted[:, start:stop], positions[:, start:stop], np.int32(start), here, cache)
        logits.append(z)
    decoded = np.concatenate(logits, axis=1)
    full = logits_of(lm, params, tokens)
    for row, pad in enumerate(padding):
        assert_same(decoded[row, pad:], full[row, : 8 - pad])


@pytest.mark.optimized
@pytest.mark.parametrize(("family", "attention"), cells(["flash", "xla"]))
def test_packed_documents_do_not_see_each_other(family, attention):
    """Interpreted, the GPU's kernel."""
    lm = replace(small_lm(draw_config(family, 2)), attention=attention)
    params = draw_params(lm)
    tokens = tokens_of(lm.config, batch=1)
    first = 10  # tokens of the first document; the second has the rest but for two of padding
    segments = np.array([[1] * first + [2] * (LENGTH - first - 2) + [0] * 2], np.int32)
    positions = np.array([[*range(first), *range(LENGTH - first)]], np.int32)
    run = jax.jit(lambda tokens: lm.logits(params, tokens, positions=positions, segments=segments))
    other = tokens.copy()
    other[0, :first] = (other[0, :first] + 1) % lm.config.vocab_size
    packed, perturbed = np.asarray(run(tokens)), np.asarray(run(other))
    assert (packed[0, first:].view("u4") == perturbed[0, first:].view("u4")).all()
    assert (packed[0, :first] != perturbed[0, :first]).any()
    alone = logits_of(lm, params, tokens[:, first:-2])
    np.testing.assert_allclose(packed[0, first:-2], alone[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", COMPUTED)
def test_the_loss_is_the_same_in_every_form_of_attention(family):
    """Value and gradients, sharded and rematerialised: flash on packed rows, and in float32, so that sums in another
    order remain."""
    layout = mesh_layout(data=2, tensor=2)
    lm = small_lm(draw_config(family, 3, num_attention_heads=4, num_key_value_heads=2))
    lm, params = on_layout(lm, layout, draw_params(lm))
    tokens = tokens_of(lm.config)
    segments = np.array([[1] * 10 + [2] * 12 + [0] * 2, [1] * 24], np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1)),
        "segments": segments,
        "loss_mask": (segments > 0).astype(np.float32),
    }

    def loss(attention):
        chosen = replace(lm, attention=attention)
        return jax.jit(jax.value_and_grad(lambda params: chosen.losses(params, batch, scan("full")).objective))(params)

    def check(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())

    jax.tree.map(check, loss("flash"), loss("xla"))


MESHES = [
    {"fsdp": 2, "tensor": 4},
    {"tensor": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 8},
    {"fsdp": 8},
    {"data": 2, "tensor": 4},
    {"data": 4, "fsdp": 2},
]


@pytest.mark.parametrize(("family", "sizes"), cells(MESHES))
def test_sharded_is_unsharded(family, sizes, double):
    """The same logits on any mesh, of a vocabulary that does not divide and fewer KV heads than tensor shards."""
    size = {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
    }
    lm, params = double_lm(family, 3, **size)
    tokens = tokens_of(lm.config, batch=8, length=6)
    layout = fit_layout(lm.config, mesh_layout(**sizes))
    sharded, placed = on_layout(lm, layout, params)
    assert sharded.vocab_padded > 61 or layout.size("vocab") == 1
    assert_same(logits_of(sharded, placed, tokens), logits_of(lm, params, tokens))


@pytest.mark.parametrize(("family", "sizes"), cells(MESHES))
def test_init_has_the_same_bits_on_any_mesh(family, sizes):
    lm = small_lm(draw_config(family, 3, num_attention_heads=8, num_key_value_heads=2, vocab_size=61))
    layout = fit_layout(lm.config, mesh_layout(**sizes))
    sharded, expected = on_layout(lm, layout, lm.init(jax.random.key(5)))
    drawn = sharded.init(jax.random.key(5))
    jax.tree.map(np.testing.assert_array_equal, bits(drawn), bits(expected))
    assert jax.tree.map(lambda leaf: leaf.sharding, drawn) == sharded.shardings()
