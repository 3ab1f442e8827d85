"""The chunked, vocabulary-sharded cross entropy: its value, its gradients, its memory, what devices exchange."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import mesh_layout

from jaxllm.core.mesh import Layout
from jaxllm.nn.linear import project
from jaxllm.nn.loss import CHUNK_BYTES, cross_entropy, loss_chunks

BATCH, LENGTH, WIDTH, VOCAB = 8, 8, 16, 101
EIGHT = dict(data=2, fsdp=2, tensor=2)


def example(seed: int = 0) -> dict[str, np.ndarray]:
    """Hidden states, a head whose logits have a standard deviation of 3, targets, and a ragged mask."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((BATCH, LENGTH)) < rng.random((BATCH, 1))).astype(np.float32)
    mask[1] = 0
    return {
        "x": rng.standard_normal((BATCH, LENGTH, WIDTH)),
        "kernel": rng.standard_normal((WIDTH, VOCAB)) * 3 / np.sqrt(WIDTH),
        "targets": rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32),
        "mask": mask,
    }


def masked_logits(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Logits of a padded vocabulary, as a model's head gives them."""
    z = project(x, kernel)
    return jnp.where(jnp.arange(z.shape[-1]) < VOCAB, z, -jnp.inf)


def value_and_gradients(layout: Layout, chunks: int, x, kernel, targets, mask):
    """Of the summed loss, on a layout that pads the vocabulary."""
    ways = layout.size("vocab")
    kernel = np.pad(kernel, ((0, 0), (0, -VOCAB % ways)))

    def loss(x, kernel):
        return cross_entropy(partial(masked_logits, kernel), x, targets, mask, layout, chunks)

    placed = (
        jax.device_put(x, layout.sharding("batch", None, None)),
        jax.device_put(kernel, layout.sharding("vocab_embed", "vocab")),
    )
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*placed)


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [({}, 1), ({}, 2), ({}, 8), (EIGHT, 1), (EIGHT, 8), (dict(tensor=8), 2), (dict(data=2, fsdp=4), 2)],
    ids=str,
)
def test_it_is_the_cross_entropy_of_torch(sizes, chunks):
    given = example()
    x, kernel = (torch.tensor(given[name], requires_grad=True) for name in ("x", "kernel"))
    targets = torch.where(torch.tensor(given["mask"]) > 0, torch.tensor(given["targets"]).long(), -100)
    logits = (x @ kernel).flatten(0, 1)
    theirs = torch.nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")
    theirs.backward()
    with jax.enable_x64(True):
        value, (x_gradient, kernel_gradient) = value_and_gradients(mesh_layout(**sizes), chunks, **given)
        np.testing.assert_allclose(value, theirs.item(), rtol=1e-13)
        np.testing.assert_allclose(x_gradient, x.grad.numpy(), rtol=0, atol=1e-13)
        np.testing.assert_allclose(kernel_gradient[:, :VOCAB], kernel.grad.numpy(), rtol=0, atol=1e-13)
        # Padding is never drawn towards anything; an untrained row has no gradient at all.
        assert not np.asarray(kernel_gradient)[:, VOCAB:].any()
        assert not np.asarray(x_gradient)[1].any()


def test_bfloat16_states_give_a_float32_loss():
    """To the rounding of the inputs: the loss itself is summed in float32."""
    given = example()
    rounded = {name: given[name].astype(jnp.bfloat16) for name in ("x", "kernel")}
    value, gradients = value_and_gradients(Layout.single(), 2, **{**given, **rounded})
    assert value.dtype == jnp.float32
    assert {gradient.dtype.name for gradient in gradients} == {"bfloat16"}
    z = torch.tensor(rounded["x"].astype(float)) @ torch.tensor(rounded["kernel"].astype(float))
    nll = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), torch.tensor(given["targets"]).long().flatten(), reduction="none"
    )
    np.testing.assert_allclose(value, (nll.numpy() * given["mask"].ravel()).sum(), rtol=1e-5)


def test_chunks_are_as_few_as_fit():
    layout, half = Layout.single(), CHUNK_BYTES // 4 // 2
    assert loss_chunks(1, 64, half // 32, layout) == 1
    assert loss_chunks(1, 64, half // 16, layout) == 2
    assert loss_chunks(1, 64, half // 16 + 1, layout) == 4
    assert loss_chunks(8, 7, half, layout) == 7  # a length that only itself divides
    assert loss_chunks(8, 64, half // 16, layout) == 8 * loss_chunks(8, 64, half // 16, mesh_layout(**EIGHT))


def compiled_gradient(layout: Layout, chunks: int, batch: int, length: int, width: int, vocab: int):
    def loss(x, kernel, targets, mask):
        return cross_entropy(lambda x: project(x, kernel), x, targets, mask, layout, chunks)

    def shape(dims, dtype, *axes):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=layout.sharding(*axes))

    arguments = (
        shape((batch, length, width), jnp.float32, "batch", None, None),
        shape((width, vocab), jnp.float32, "vocab_embed", "vocab"),
        shape((batch, length), jnp.int32, "batch", None),
        shape((batch, length), jnp.float32, "batch", None),
    )
    gradients = (arguments[0].sharding, arguments[1].sharding)
    jitted = jax.jit(jax.grad(loss, argnums=(0, 1)), out_shardings=gradients)
    return jitted.lower(*arguments).compile()


@pytest.mark.optimized
def test_one_chunk_of_logits_exists_at_a_time():
    """Two or three arrays of a chunk (logits, their gradient, the head's gradient, which is as large here), where the
    loss without chunks takes as many of the whole batch.
    """
    batch, length, width, vocab, chunks = 4, 256, 64, 32768, 16
    logits = 4 * batch * length * vocab
    assert 4 * width * vocab == logits / chunks
    whole, chunked = (
        compiled_gradient(Layout.single(), n, batch, length, width, vocab).memory_analysis().temp_size_in_bytes
        for n in (1, chunks)
    )
    assert whole >= 2 * logits
    assert chunked < 4 * logits / chunks


@pytest.mark.optimized
@pytest.mark.parametrize("sizes", [EIGHT, dict(tensor=8), dict(fsdp=8)], ids=str)
def test_no_device_ever_holds_the_whole_vocabulary(sizes):
    """Neither collectives nor anything else in the compiled program: logits and head stay cut into eighths."""
    batch, length, width, vocab = 8, 6, 10, 13 * 16  # no other dimension is a multiple of 13
    shares = 8 if sizes != EIGHT else 4  # data does not split the vocabulary
    text = compiled_gradient(mesh_layout(**sizes), 2, batch, length, width, vocab).as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", text)}
    matrices = {dims for dims in shapes if len(dims) > 1 and any(dim % 13 == 0 for dim in dims)}
    assert {dim for dims in matrices for dim in dims if dim % 13 == 0} == {vocab // shares}
    assert re.search("all-(gather|reduce)", text)
