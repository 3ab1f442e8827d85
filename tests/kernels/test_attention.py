"""The forms of attention: the plain one against torch, the flash kernel (interpreted) against the plain one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm.core.mesh import Layout
from jaxllm.kernels import attention
from jaxllm.kernels.attention import attend, attention_from, causal_attention, causal_mask, plain_attention
from jaxllm.kernels.attention_spec import PLAIN, AttentionSpec
from jaxllm.kernels.flash_attention import flash_attention
from tests.support.families import mesh_layout

# Float32: the forms add the same numbers in another order. Measured: 2e-7 to 1e-6.
REORDERED = 4e-6


def draw(batch: int, length: int, heads: int, kv_heads: int, width: int) -> list[np.ndarray]:
    """q, k, v and the gradient of the result."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((batch, length, n, width)) for n in (heads, kv_heads, kv_heads, heads)]


def documents(length: int, *lengths: int) -> np.ndarray:
    """A row of documents numbered from 1, and padding."""
    return np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, length - sum(lengths)]).astype(np.int32)


def compiled(attention):
    """`(q, k, v, dy) -> [y, dq, dk, dv]`."""

    @jax.jit
    def run(q, k, v, dy):
        y, pullback = jax.vjp(attention, q, k, v)
        return y, *pullback(dy)

    return lambda *arrays: [np.asarray(a) for a in run(*arrays)]


def with_gradients(attention, *arrays):
    return compiled(attention)(*arrays)


def assert_close(ours, theirs, tolerance):
    for name, a, b in zip(("y", "dq", "dk", "dv"), ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


def whole(q, k, v, segments):
    """All queries at once, as tests/nn/test_layers.py compares it with torch."""
    return attend(q, k, v, causal_mask(segments, 0, q.shape[1]))


@pytest.mark.parametrize("length", [300, 1100], ids=["three parts", "parts of an eighth"])
def test_plain_attention_is_that_of_torch(length):
    """In float64, value and gradients, with grouped heads, packed documents and padding."""
    q, k, v, dy = draw(2, length, 4, 2, 8)
    segments = np.stack([documents(length, 100, 60, 90), documents(length, length)])
    tensors = [torch.tensor(a, requires_grad=True) for a in (q, k, v)]
    mask = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None])
    y = torch.nn.functional.scaled_dot_product_attention(
        *(a.transpose(1, 2) for a in tensors), attn_mask=torch.tensor(mask)[:, None], enable_gqa=True
    ).transpose(1, 2)
    y.backward(torch.tensor(dy))
    with jax.enable_x64(True):
        ours = with_gradients(partial(plain_attention, segments=jnp.asarray(segments)), q, k, v, dy)
    assert_close(ours, [y.detach().numpy(), *(a.grad.numpy() for a in tensors)], 1e-13)


# Lengths that are no multiple of a tile, one, two and four query heads a key head, heads of all tile sizes.
SHAPES = {
    "two heads a group": ((2, 200, 4, 2, 64), [documents(200, 70, 61, 29), documents(200, 200)]),
    "one key head, width between powers of two": ((1, 300, 4, 1, 80), [documents(300, 1, 150, 149)]),
    "no groups": ((1, 256, 2, 2, 128), [documents(256, 100, 100)]),
    "wide heads": ((1, 130, 1, 1, 256), [documents(130, 64, 66)]),
    "segments in any order": ((1, 260, 2, 1, 16), [np.arange(260, dtype=np.int32) * 7 % 5]),
    "one document a row": ((1, 150, 2, 1, 64), None),
}


@pytest.mark.parametrize("name", SHAPES)
def test_flash_is_plain_in_value_and_gradients(name):
    shape, rows = SHAPES[name]
    arrays = [a.astype(np.float32) for a in draw(*shape)]
    segments = None if rows is None else jnp.asarray(np.stack(rows))
    ours = with_gradients(partial(flash_attention, segments=segments, interpret=True), *arrays)
    assert_close(ours, with_gradients(partial(whole, segments=segments), *arrays), REORDERED)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_in_half_precision_rounds_as_little_as_plain(dtype):
    """Against float64: products of rounded weights and values, summed in float32."""
    exact = [np.asarray(a.astype(dtype), np.float64) for a in draw(1, 200, 4, 2, 64)]
    segments = jnp.asarray(documents(200, 90, 80)[None])
    given = [a.astype(dtype) for a in exact]
    ours = with_gradients(partial(flash_attention, segments=segments, interpret=True), *given)
    plain = with_gradients(partial(plain_attention, segments=segments), *given)
    with jax.enable_x64(True):
        expected = with_gradients(partial(whole, segments=segments), *exact)
    assert {a.dtype.name for a in ours} == {dtype}
    for a, b, c in zip(ours, plain, expected, strict=True):
        assert np.abs(a.astype(float) - c).max() < 1.5 * np.abs(b.astype(float) - c).max() + 1e-3 * np.abs(c).max()


@pytest.mark.optimized
def test_tiles_of_other_documents_are_not_visited():
    """Not a number, times the weight 0, would be seen; the second document's tiles begin where the first's end."""
    segments = jnp.asarray(documents(512, 256, 200)[None])
    run = compiled(partial(flash_attention, segments=segments, interpret=True))
    arrays = [a.astype(np.float32) for a in draw(1, 512, 4, 2, 64)]
    before = run(*arrays)
    for place in (slice(0, 256), slice(256, 512)):
        spoilt = [a.copy() for a in arrays]
        for a in spoilt:
            a[:, place] = np.nan
        for a, b in zip(before, run(*spoilt), strict=True):
            keep = slice(256, 456) if place.start == 0 else slice(0, 256)
            assert a[:, keep].tobytes() == b[:, keep].tobytes()


# Key heads that divide over the tensor axis; that do not, each device reading one, and reading several.
MESHES = {
    "heads divide": (dict(data=2, fsdp=2, tensor=2), 8, 4),
    "a key head for two devices": (dict(fsdp=2, tensor=4), 8, 2),
    "key heads across devices": (dict(data=4, tensor=2), 6, 3),
}


@pytest.mark.parametrize("name", MESHES)
def test_flash_on_a_mesh_is_flash_on_one_device(name):
    sizes, heads, kv_heads = MESHES[name]
    layout = mesh_layout(**sizes)
    if kv_heads % sizes["tensor"]:
        layout = layout.replace(act_kv_heads=())
    arrays = [a.astype(np.float32) for a in draw(4, 140, heads, kv_heads, 16)]
    segments = jnp.asarray(np.stack([documents(140, 50 + 15 * i, 40) for i in range(4)]))

    def run(layout):
        return with_gradients(lambda *qkv: causal_attention("flash", *qkv, segments, layout), *arrays)

    assert_close(run(layout), run(Layout.single()), REORDERED)


# Queries from anywhere of the row on, to its end or not, of no multiple of a tile.
PARTS = [(300, 75, 100), (300, 0, 300), (260, 131, 129), (400, 399, 1)]


@pytest.mark.parametrize(
    ("form", "keys", "first", "length"),
    [*(("flash", *part) for part in PARTS), ("xla", *PARTS[0]), pytest.param("xla", *PARTS[2], marks=pytest.mark.full)],
)
def test_a_part_of_the_queries(form, keys, first, length):
    """Against the same rows of all, in value and gradients; where the part begins is traced."""
    part = slice(first, first + length)
    segments = jnp.asarray(np.stack([documents(keys, 70, 130), documents(keys, keys)]))
    arrays = [a.astype(np.float32) for a in draw(2, keys, 4, 2, 16)]
    q, k, v, dy = arrays
    dy[:, : part.start] = dy[:, part.stop :] = 0
    y, dq, dk, dv = with_gradients(partial(whole, segments=segments), q, k, v, dy)
    attention = partial(flash_attention, interpret=True) if form == "flash" else attention_from

    @jax.jit
    def run(first, q, k, v, dy):
        y, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, segments, PLAIN, first), q, k, v)
        return y, *pullback(dy)

    ours = [np.asarray(a) for a in run(first, q[:, part], k, v, dy[:, part])]
    assert_close(ours, (y[:, part], dq[:, part], dk, dv), REORDERED)


SPLIT = {
    "grouped heads on both axes": (dict(context=4, tensor=2), 8, 4, 260),
    "a key head for two devices": (dict(context=2, tensor=4), 8, 2, 130),
    "three parts of an odd length": (dict(data=2, context=3), 2, 1, 3 * 65),
}


@pytest.mark.parametrize(
    ("name", "form", "packed"),
    [
        ("grouped heads on both axes", "flash", True),
        ("grouped heads on both axes", "xla", True),
        pytest.param("grouped heads on both axes", "xla", False, marks=pytest.mark.full),
        pytest.param("a key head for two devices", "flash", True, marks=pytest.mark.full),
        pytest.param("a key head for two devices", "xla", True, marks=pytest.mark.full),
        pytest.param("three parts of an odd length", "flash", False, marks=pytest.mark.full),
    ],
)
def test_a_length_that_is_split_is_attended_to_whole(name, form, packed):
    sizes, heads, kv_heads, length = SPLIT[name]
    layout = mesh_layout(**sizes)
    if kv_heads % layout.size("act_kv_heads"):
        layout = layout.replace(act_kv_heads=())
    arrays = [a.astype(np.float32) for a in draw(2, length, heads, kv_heads, 16)]
    rows = np.stack([documents(length, 50, length - 60), documents(length, 3, 90)])
    segments = jnp.asarray(rows) if packed else None
    ours = with_gradients(lambda *qkv: causal_attention(form, *qkv, segments, layout), *arrays)
    theirs = with_gradients(lambda *qkv: plain_attention(*qkv, segments), *arrays)
    if packed:  # what padding gives trains nothing, and is no one's
        ours, theirs = ([np.where(rows[..., None, None] > 0, a, 0) for a in each] for each in (ours, theirs))
    assert_close(ours, theirs, REORDERED)


@pytest.mark.parametrize("ways", [2, 3, 8])
def test_the_work_is_even(ways, monkeypatch):
    """Each of `ways` devices has as many keys to look at; what is exchanged comes back to its place.

    The kernel is one that tells of each query how many keys its call must look at, and how many it must itself.
    """
    layout, length = mesh_layout(context=ways), 16 * ways

    def cost(q, k, v, segments, spec, first, *, interpret):
        seen = 1 + first + jnp.arange(q.shape[1])
        return jnp.stack([jnp.full_like(seen, jnp.sum(seen)), seen], axis=-1)[None, :, None].astype(q.dtype)

    monkeypatch.setattr(attention, "flash_attention", cost)
    y = jax.jit(lambda q: causal_attention("flash", q, q, q, None, layout))(jnp.ones((1, length, 1, 2)))
    of_calls, of_queries = np.asarray(y)[0, :, 0].T
    assert of_queries.tolist() == [*range(1, length + 1)]
    halves = of_calls.reshape(ways, 2, -1)[:, :, 0]
    by_device = halves[:, 0] + halves[::-1, 1]
    assert by_device.sum() == length * (length + 1) / 2
    assert np.ptp(by_device) == 0


def test_what_cannot_be_where_the_length_is_split():
    q, _, _, _ = (jnp.asarray(a) for a in draw(1, 16, 2, 2, 64))
    layout = mesh_layout(context=2)
    with pytest.raises(ValueError, match="no queries that begin behind the first key"):
        causal_attention("cudnn", q, q, q, None, layout)
    with pytest.raises(ValueError, match="splits the length, cannot have keys of virtual tokens in front"):
        causal_attention("xla", q, jnp.concatenate([q, q], 1), q, None, layout, AttentionSpec(prefix=16))


@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_flash_becomes_gpu_kernels(width, dtype):
    """Forward, dq, and dk with dv, as Triton's programs; no GPU is needed to make them."""
    shapes = [jax.ShapeDtypeStruct((2, 1000, heads, width), dtype) for heads in (6, 2, 2, 6)]
    segments = jax.ShapeDtypeStruct((2, 1000), jnp.int32)

    def run(q, k, v, dy, segments):
        y, pullback = jax.vjp(lambda *qkv: flash_attention(*qkv, segments), q, k, v)
        return y, pullback(dy)

    text = jax.jit(run).trace(*shapes, segments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_cudnn_refuses_segments():
    q, k, v, _ = draw(1, 16, 2, 2, 64)
    with pytest.raises(ValueError, match="does not keep documents apart"):
        causal_attention("cudnn", q, k, v, jnp.ones((1, 16), jnp.int32), Layout.single())


@pytest.mark.optimized
def test_flash_is_not_run_again_where_its_result_is_saved_by_name():
    """Each interpreted kernel is some loops of the compiled program."""
    shapes = [jax.ShapeDtypeStruct((1, 128, heads, 16), jnp.float32) for heads in (2, 2, 2)]

    def loops(policy):
        def loss(q, k, v):
            y = jax.checkpoint(partial(flash_attention, segments=None, interpret=True), policy=policy)(q, k, v)
            return jnp.sum(jnp.square(y))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().as_text().count(" while(")

    policies = jax.checkpoint_policies
    everything, nothing = loops(policies.everything_saveable), loops(policies.nothing_saveable)
    assert loops(policies.save_only_these_names("attn_context")) == everything < nothing
