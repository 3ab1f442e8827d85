"""What an `AttentionSpec` asks for, in every form: against arithmetic of numpy, and the forms against each other."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.mesh import Layout
from jaxllm.kernels.attention import attention_from, causal_attention, lacks, plain_attention
from jaxllm.kernels.attention_choice import AttentionNeeds, fault, obstacle
from jaxllm.kernels.attention_spec import PLAIN, AttentionSpec
from jaxllm.kernels.flash_attention import Places, Tiles, flash_attention, meeting, past_last, tiles_of
from tests.kernels.test_attention import REORDERED, documents, draw
from tests.kernels.test_attention_choice import on_card
from tests.support.families import mesh_layout

HEADS, KV_HEADS = 4, 2
SINKS = np.array([0.5, -1.0, 2.0, 0.0])
SLOPES = 2.0 ** -np.arange(1.0, 5.0)


def by_hand(q, k, v, segments, spec: AttentionSpec):
    """One query of one head at a time, of rows without virtual tokens."""
    y = np.zeros(q.shape)
    for b, t, h in np.ndindex(*q.shape[:3]):
        window = t + 1 if spec.window is None else int(spec.window)
        seen = [s for s in range(max(0, t - window + 1), t + 1) if segments[b, s] == segments[b, t]]
        of_keys = h // (q.shape[2] // k.shape[2])
        scores = np.array([q[b, t, h] @ k[b, s, of_keys] for s in seen])
        scores = scores / np.sqrt(q.shape[3]) if spec.scale is None else scores * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
        if spec.slopes is not None:
            scores = scores + np.asarray(spec.slopes)[h] * (np.array(seen) - t)
        weights = np.exp(scores)
        total = weights.sum() + (0 if spec.sinks is None else np.exp(np.asarray(spec.sinks)[h]))
        y[b, t, h] = sum(w / total * v[b, s, of_keys] for w, s in zip(weights, seen, strict=True))
    return y


SPECS: dict[str, Any] = {
    "window": dict(window=7),
    "soft cap and scale": dict(soft_cap=1.5, scale=0.7),
    "sinks": dict(sinks=SINKS),
    "slopes": dict(slopes=SLOPES),
    "all": dict(window=5, soft_cap=1.5, scale=0.7, sinks=SINKS, slopes=SLOPES),
}


@pytest.mark.parametrize("name", SPECS)
def test_plain_attention_is_what_the_spec_says(name):
    q, k, v, _ = draw(2, 40, HEADS, KV_HEADS, 4)
    segments = np.stack([documents(40, 17, 20), documents(40, 40)])
    spec = AttentionSpec(**SPECS[name])
    with jax.enable_x64(True):
        ours = jax.jit(lambda *given: plain_attention(*given, spec))(q, k, v, segments)
    np.testing.assert_allclose(ours, by_hand(q, k, v, segments, spec), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["window", "slopes"])
def test_virtual_tokens_stand_in_front_of_each_document(name):
    """A document packed behind another is as far from the virtual tokens as it is alone: two without queries and one
    with, which is the first of the row."""
    prefix, shared, lengths = 2, 1, (9, 6)
    spec = AttentionSpec(**SPECS[name], prefix=prefix, shared=shared)
    front, row = prefix + shared, shared + sum(lengths)
    q, k, v, _ = draw(1, prefix + row, HEADS, KV_HEADS, 4)
    q = q[:, prefix:]
    segments = np.repeat([-1, 1, 2], [front, *lengths])[None].astype(np.int32)
    keys = np.r_[:front, front + lengths[0] : prefix + row]
    run = jax.jit(lambda q, k, v, segments: plain_attention(q, k, v, segments, spec))
    with jax.enable_x64(True):
        packed = run(q, k, v, segments)
        alone = run(q[:, keys[prefix:] - prefix], k[:, keys], v[:, keys], None)
    np.testing.assert_allclose(packed[:, -lengths[1] :], alone[:, -lengths[1] :], rtol=0, atol=1e-13)


def with_gradients(attention, spec: AttentionSpec, segments, q, k, v, dy):
    """`[y, dq, dk, dv, dsinks]`, the last where there are sinks. The window is traced."""

    @jax.jit
    def run(q, k, v, dy, window, sinks):
        def f(q, k, v, sinks):
            return attention(q, k, v, segments, spec._replace(window=window, sinks=sinks))

        y, pullback = jax.vjp(f, q, k, v, sinks)
        return y, *pullback(dy)

    window = None if spec.window is None else np.int32(spec.window)
    sinks = None if spec.sinks is None else spec.sinks.astype(q.dtype)
    return [np.asarray(a) for a in run(q, k, v, dy, window, sinks) if a is not None]


def assert_same(ours, theirs):
    for name, a, b in zip(("y", "dq", "dk", "dv", "dsinks"), ours, theirs, strict=False):
        np.testing.assert_allclose(a, b, rtol=0, atol=REORDERED * np.abs(b).max(), err_msg=name)
    assert len(ours) == len(theirs)


FLASH = partial(flash_attention, interpret=True)
PACKED = np.stack([documents(300, 140, 100, 30), documents(300, 300)])
FLASH_CASES: dict[str, tuple[Any, Any]] = {
    "window": (dict(window=70), None),
    "window of two": (dict(window=2), PACKED),
    "window longer than the row": (dict(window=2**31 - 1), PACKED),
    "no window": (dict(soft_cap=1.5, scale=0.7, sinks=SINKS), PACKED),
    "all": (dict(window=70, soft_cap=1.5, scale=0.7, sinks=SINKS), PACKED),
}
QUICK = ("window", "all")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.full) for name in FLASH_CASES if name not in QUICK)]
)
def test_flash_is_plain_in_value_and_gradients(name):
    numbers, segments = FLASH_CASES[name]
    arrays = [a.astype(np.float32) for a in draw(2, 300, HEADS, KV_HEADS, 16)]
    spec = AttentionSpec(**numbers)
    assert_same(
        with_gradients(FLASH, spec, segments, *arrays), with_gradients(plain_attention, spec, segments, *arrays)
    )


@pytest.mark.parametrize("form", ["flash", pytest.param("xla", marks=pytest.mark.full)])
def test_a_mesh_that_splits_the_length_and_the_heads(form):
    layout = mesh_layout(context=2, tensor=2, data=2)
    arrays = [a.astype(np.float32) for a in draw(2, 260, HEADS, KV_HEADS, 16)]
    segments = np.stack([documents(260, 150, 110), documents(260, 260)])
    spec = AttentionSpec(window=70, soft_cap=1.5, sinks=SINKS)

    def on_mesh(q, k, v, segments, spec):
        return causal_attention(form, q, k, v, segments, layout, spec)

    assert_same(
        with_gradients(on_mesh, spec, segments, *arrays), with_gradients(plain_attention, spec, segments, *arrays)
    )


def test_slopes_of_a_part_of_the_queries():
    q, k, v, _ = (a.astype(np.float32) for a in draw(1, 200, HEADS, KV_HEADS, 8))
    spec = AttentionSpec(slopes=SLOPES.astype(np.float32), window=50)  # pyright: ignore
    whole, part = jax.jit(
        lambda q, k, v, first: (
            plain_attention(q, k, v, None, spec),
            attention_from(q[:, 120:], k, v, None, spec, first),
        )
    )(q, k, v, np.int32(120))
    np.testing.assert_allclose(part, whole[:, 120:], rtol=0, atol=REORDERED)


@partial(jax.jit, static_argnums=1)
def bounds(places: Places, tiles: Tiles):
    past = past_last(jnp.arange(places.queries.shape[1] // tiles.queries), 0, tiles)
    return *(a[0] for a in meeting(places, tiles)), past


@pytest.mark.parametrize("window", [1, 200, 1024, 4096])
def test_tiles_outside_a_window_are_not_visited(window):
    """Of a row of 4096 keys the forward kernel visits as many tiles as hold a key that a query of the tile sees, and
    so do both backward kernels."""
    length = 4096
    segments: Any = np.ones((1, length), np.int32)
    first_key: Any = np.zeros(1, np.int32)
    of_window: Any = np.array([window], np.int32)
    places = Places(first_key, segments, segments, of_window)
    at = np.arange(length)
    sees = (at[:, None] >= at[None, :]) & (at[:, None] - at[None, :] < window)
    for tiles in tiles_of(128):
        needed = sees.reshape(length // tiles.queries, tiles.queries, -1, tiles.keys).any((1, 3)).sum()
        first, last, past = (np.asarray(a) for a in bounds(places, tiles))
        assert np.maximum(past - first, 0).sum() == needed
        earliest = np.arange(length // tiles.keys) * tiles.keys // tiles.queries
        assert np.maximum(last + 1 - earliest, 0).sum() == needed


def test_flash_becomes_gpu_kernels_with_all_that_it_has():
    """Forward, dq, and dk with dv, as Triton's programs; no GPU is needed to make them."""
    shapes = [jax.ShapeDtypeStruct((2, 1000, heads, 128), jnp.bfloat16) for heads in (6, 2, 2, 6)]
    segments, window = jax.ShapeDtypeStruct((2, 1000), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def run(q, k, v, dy, segments, window, sinks):
        spec = AttentionSpec(window=window, soft_cap=50.0, sinks=sinks)
        y, pullback = jax.vjp(lambda *qkv: flash_attention(*qkv, segments, spec), q, k, v)
        return y, pullback(dy)

    sinks = jax.ShapeDtypeStruct((6,), jnp.float32)
    text = jax.jit(run).trace(*shapes, segments, window, sinks).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


ANY: Any = np.ones(4, np.float32)
WINDOW: Any = np.int32(8)


@pytest.mark.parametrize(
    ("form", "spec", "said"),
    [
        ("cudnn", AttentionSpec(window=8, scale=0.1), None),
        ("cudnn", AttentionSpec(window=WINDOW), "no window that differs between layers"),
        ("cudnn", AttentionSpec(soft_cap=50.0), "no soft cap of scores"),
        ("cudnn", AttentionSpec(sinks=ANY), "no sinks in the softmax"),
        ("cudnn", AttentionSpec(slopes=ANY), "no slopes by distance (ALiBi)"),
        ("flash", AttentionSpec(window=WINDOW, soft_cap=50.0, sinks=ANY), None),
        ("flash", AttentionSpec(slopes=ANY), "no slopes by distance (ALiBi)"),
        ("xla", AttentionSpec(WINDOW, 50.0, WINDOW, ANY, ANY), None),
    ],
)
def test_what_a_form_lacks(form, spec, said):
    """Said before a run, and refused by the call itself."""
    reason = obstacle(form, on_card(packed=False, spec=spec))
    if said is None:
        assert reason is None
        return
    assert reason == f"has {said}, as the model's attention needs"
    assert lacks(form, spec) == f"has {said}"
    q: Any = np.zeros((1, 8, 4, 8))
    with pytest.raises(ValueError, match=re.escape(f"the attention '{form}' has {said}")):
        causal_attention(form, q, q, q, None, Layout.single(), spec)


def ignores_the_window(q, k, v, segments, layout, spec):
    return plain_attention(q, k, v, segments, spec._replace(window=None))


def ignores_the_cap(q, k, v, segments, layout, spec):
    return plain_attention(q, k, v, segments, spec._replace(soft_cap=None))


def ignores_the_sinks(q, k, v, segments, layout, spec):
    return plain_attention(q, k, v, segments, spec._replace(sinks=None))


@pytest.mark.full
@pytest.mark.optimized
def test_the_test_before_a_run_has_the_spec():
    """A window of any size and a cap of 50 show in its 256 tokens."""
    spec = AttentionSpec(soft_cap=50.0, window=WINDOW, sinks=ANY)
    needs = AttentionNeeds(Layout.single(), HEADS, KV_HEADS, 16, np.float32, packed=True, spec=spec)
    assert fault(partial(causal_attention, "flash"), needs) is None
    for wrong in (ignores_the_window, ignores_the_cap, ignores_the_sinks):
        assert (fault(wrong, needs) or "").startswith("is wrong: result misses"), wrong.__name__
    assert needs.test_spec._replace(window=None, soft_cap=None, sinks=None) == PLAIN


@pytest.mark.gpu
@pytest.mark.optimized
@pytest.mark.parametrize("window", [4096, WINDOW], ids=["static", "traced"])
@pytest.mark.parametrize("others", [dict(), dict(soft_cap=50.0), dict(sinks=ANY)], ids=["alone", "cap", "sinks"])
@pytest.mark.parametrize("form", ["flash", "cudnn"])
def test_every_form_has_its_spec_on_a_card(form, others, window):
    spec = AttentionSpec(window=window, **others)
    for shape in ((4, 2, 64), (4, 1, 128), (4, 2, 256)):
        for packed in (True, False):
            case = AttentionNeeds(Layout.single(), *shape, "bfloat16", packed, spec=spec)
            if obstacle(form, case) is None:
                assert fault(partial(causal_attention, form), case) is None
