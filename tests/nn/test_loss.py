"""The chunked, vocabulary-sharded cross entropy: its value, its gradients, its memory, what devices exchange."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm.core.mesh import Layout
from jaxllm.nn.chunks import CHUNK_BYTES
from jaxllm.nn.linear import project
from jaxllm.nn.loss import loss_chunks, token_scores
from jaxllm.objectives.base import CROSS_ENTROPY, CrossEntropy, Losses, Objective, reads_mean_logit
from tests.support.families import mesh_layout

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


def losses_of(
    logits: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    layout: Layout,
    *,
    objective: Objective = CROSS_ENTROPY,
    **how: int,
) -> Losses:
    """The objective of the scores, as a model takes it."""
    scores = token_scores(logits, x, targets, layout, mean=reads_mean_logit(objective), **how)
    return objective(scores, {"loss_mask": mask}, None)


def value_and_gradients(layout: Layout, chunks: int, x, kernel, targets, mask, objective: Objective = CROSS_ENTROPY):
    """The losses, and the gradients of the objective, on a layout that pads the vocabulary."""
    ways = layout.size("vocab")
    kernel = np.pad(kernel, ((0, 0), (0, -VOCAB % ways)))

    def loss(x, kernel):
        head = partial(masked_logits, kernel)
        sums = losses_of(head, x, targets, mask, layout, vocab_size=VOCAB, chunks=chunks, objective=objective)
        return sums.objective, sums

    placed = (
        jax.device_put(x, layout.sharding("batch", None, None)),
        jax.device_put(kernel, layout.sharding("vocab_embed", "vocab")),
    )
    (_, losses), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*placed)
    return losses, gradients


OBJECTIVES = [CrossEntropy(), CrossEntropy(label_smoothing=0.1), CrossEntropy(z_loss=1e-3), CrossEntropy(0.2, 1e-4)]


@pytest.mark.parametrize(
    ("sizes", "chunks"),
    [({}, 1), ({}, 2), ({}, 8), (EIGHT, 1), (EIGHT, 8), (dict(tensor=8), 2), (dict(data=2, fsdp=4), 2)],
    ids=str,
)
@pytest.mark.parametrize("objective", OBJECTIVES[::3], ids=["plain", "smoothed with z-loss"])
def test_it_is_the_cross_entropy_of_torch(sizes, chunks, objective):
    check_against_torch(sizes, chunks, objective)


@pytest.mark.parametrize("objective", OBJECTIVES[1:3], ids=["smoothed", "z-loss"])
def test_smoothing_and_z_loss_alone(objective):
    check_against_torch(EIGHT, 2, objective)


def check_against_torch(sizes: dict[str, int], chunks: int, objective: CrossEntropy) -> None:
    """Values and gradients, of the real vocabulary alone, in float64."""
    given = example()
    x, kernel = (torch.tensor(given[name], requires_grad=True) for name in ("x", "kernel"))
    targets = torch.where(torch.tensor(given["mask"]) > 0, torch.tensor(given["targets"]).long(), -100)
    logits = (x @ kernel).flatten(0, 1)
    torch_loss = partial(
        torch.nn.functional.cross_entropy, logits, targets.flatten(), ignore_index=-100, reduction="sum"
    )
    log_z = torch.logsumexp(logits, -1)[targets.flatten() >= 0]
    z_loss = objective.z_loss * (log_z**2).sum()
    theirs = torch_loss(label_smoothing=objective.label_smoothing) + z_loss
    theirs.backward()
    with jax.enable_x64(True):
        losses, (x_gradient, kernel_gradient) = value_and_gradients(
            mesh_layout(**sizes), chunks, **given, objective=objective
        )
        np.testing.assert_allclose(losses.objective, theirs.item(), rtol=1e-13)
        np.testing.assert_allclose(losses.cross_entropy, torch_loss().item(), rtol=1e-13)
        np.testing.assert_allclose(losses.parts.get("z_loss", 0), z_loss.item(), rtol=1e-13)
        np.testing.assert_allclose(x_gradient, x.grad.numpy(), rtol=0, atol=1e-13)
        np.testing.assert_allclose(kernel_gradient[:, :VOCAB], kernel.grad.numpy(), rtol=0, atol=1e-13)
        # Padding is never drawn towards anything; an untrained row has no gradient at all.
        assert not np.asarray(kernel_gradient)[:, VOCAB:].any()
        assert not np.asarray(x_gradient)[1].any()


def test_bfloat16_states_give_a_float32_loss():
    """To the rounding of the inputs: the loss itself is summed in float32."""
    given = example()
    rounded = {name: given[name].astype(jnp.bfloat16) for name in ("x", "kernel")}
    losses, gradients = value_and_gradients(Layout.single(), 2, **{**given, **rounded}, objective=OBJECTIVES[3])
    assert {loss.dtype.name for loss in jax.tree.leaves(losses)} == {"float32"}
    assert {gradient.dtype.name for gradient in gradients} == {"bfloat16"}
    z = torch.tensor(rounded["x"].astype(float)) @ torch.tensor(rounded["kernel"].astype(float))
    nll = torch.nn.functional.cross_entropy(
        z.flatten(0, 1), torch.tensor(given["targets"]).long().flatten(), reduction="none"
    )
    np.testing.assert_allclose(losses.cross_entropy, (nll.numpy() * given["mask"].ravel()).sum(), rtol=1e-5)


def test_chunks_are_as_few_as_fit():
    layout, half = Layout.single(), CHUNK_BYTES // 4 // 2
    assert loss_chunks(1, 64, half // 32, layout) == 1
    assert loss_chunks(1, 64, half // 16, layout) == 2
    assert loss_chunks(1, 64, half // 16 + 1, layout) == 4
    assert loss_chunks(8, 7, half, layout) == 7  # a length that only itself divides
    assert loss_chunks(8, 64, half // 16, layout) == 8 * loss_chunks(8, 64, half // 16, mesh_layout(**EIGHT))


def compiled_gradient(
    layout: Layout,
    chunks: int,
    batch: int,
    length: int,
    width: int,
    vocab: int,
    objective: Objective = CROSS_ENTROPY,
):
    def loss(x, kernel, targets, mask):
        def head(x):
            return project(x, kernel)

        sums = losses_of(head, x, targets, mask, layout, vocab_size=vocab, chunks=chunks, objective=objective)
        return sums.objective

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
@pytest.mark.parametrize("objective", OBJECTIVES[::3], ids=["plain", "smoothed with z-loss"])
@pytest.mark.parametrize("sizes", [{}, dict(tensor=8), dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_a_large_vocabulary_takes_the_memory_of_a_chunk(sizes, objective):
    """Forward and backward over 128k tokens, in the chunks that a run takes.

    A device holds two arrays of a chunk's logits (the logits and their gradient), its share of the head's gradient
    twice (the sum so far and a chunk's), and what is as wide as the hidden states: of all its logits an eighth.
    """
    layout = mesh_layout(**sizes)
    batch, length, width, vocab = 8, 4096, 32, 2**17
    ways = layout.size("act_vocab") * layout.size("act_vocab_batch")
    chunks = loss_chunks(batch, length, vocab, layout)
    logits = 4 * batch * length * vocab // ways
    assert chunks == logits // CHUNK_BYTES
    assert chunks >= 8
    compiled = compiled_gradient(layout, chunks, batch, length, width, vocab, objective)
    head = 4 * width * vocab // layout.size("act_vocab")
    hidden = 4 * batch * length * width
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * CHUNK_BYTES + 2 * head + 4 * hidden


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


@pytest.mark.parametrize("chunks", [1, 4])
def test_targets_are_drawn_from_the_softmax(chunks):
    """Of 16,384 draws each token has its share, to within 5 standard deviations, and the padding has none."""
    rows, length, vocabulary = 16, 1024, 5
    z = np.array([0.0, 1.0, 2.0, -1.0, -np.inf, -np.inf, -np.inf, -np.inf], np.float32)
    keys = jax.random.split(jax.random.key(0), (rows, length))

    def loss(x, keys):
        mask = jnp.ones((rows, length))
        options = dict(vocab_size=vocabulary, chunks=chunks)
        return losses_of(lambda x: x, x, keys, mask, Layout.single(), **options).objective

    gradient = jax.jit(jax.grad(loss))(jnp.broadcast_to(jnp.asarray(z), (rows, length, len(z))), keys)
    share = np.exp(z) / np.exp(z).sum()
    drawn = np.asarray(share - gradient).round(3)  # the gradient is the softmax less the drawn token
    assert set(np.unique(drawn)) == {0.0, 1.0}
    count = rows * length
    deviation = np.sqrt(share * (1 - share) / count)
    assert (np.abs(drawn.mean((0, 1)) - share) <= 5 * deviation).all()
    # Each token has its own draw.
    assert (drawn[0] != drawn[1]).any()
