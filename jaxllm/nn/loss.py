"""The cross entropy of next-token prediction, without ever holding all logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxllm.core.mesh import Layout

# A chunk's logits take at most this much of a device; smaller chunks cost speed, larger ones the memory that
# the chunks are there to save.
CHUNK_BYTES = 256 * 2**20


def loss_chunks(batch: int, length: int, vocab_size: int, layout: Layout) -> int:
    """The smallest number of equal chunks of a `[batch, length]` batch whose float32 logits fit in CHUNK_BYTES."""
    share = layout.size("act_vocab") * layout.size("act_vocab_batch")
    whole = 4 * batch * length * vocab_size / share
    return next((n for n in range(1, length) if length % n == 0 and whole / n <= CHUNK_BYTES), length)


def cross_entropy(
    logits: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    layout: Layout,
    chunks: int,
) -> jax.Array:
    """The sum over trained tokens of −log softmax(logits(x))[target], a scalar in at least float32.

    x: `[B, T, D]`, the input of `logits`, which gives `[b, t, V]`. targets: `[B, T]` int32. mask: `[B, T]`, 1 where
    the target is trained. `chunks` divides T: one chunk's logits exist at a time, and are computed again in the
    backward pass.
    """

    @jax.checkpoint
    def chunk_sum(x: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
        # The tokens are gathered over the axes that split the vocabulary, which is much less than the matrix.
        x = layout.constrain(x, "act_vocab_batch", None, None)
        z = layout.constrain(logits(x), "act_vocab_batch", None, "act_vocab")
        # A comparison keeps the vocabulary split; an index would gather it.
        hit = targets[..., None] == jnp.arange(z.shape[-1])
        target_logit = jnp.sum(jnp.where(hit, z, 0), axis=-1)
        return jnp.sum((jax.nn.logsumexp(z, axis=-1) - target_logit) * mask.astype(z.dtype))

    if chunks == 1:
        return chunk_sum(x, targets, mask)

    def split(a: jax.Array) -> jax.Array:
        batch, length, *rest = a.shape
        return jnp.moveaxis(a.reshape(batch, chunks, length // chunks, *rest), 1, 0)

    parts = jax.lax.map(lambda chunk: chunk_sum(*chunk), (split(x), split(targets), split(mask)))
    return jnp.sum(parts)
