"""The scores of next-token prediction, without ever holding all logits."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxllm.core.mesh import Layout
from jaxllm.nn.chunks import chunks_of, in_chunks, joined
from jaxllm.objectives.base import TokenScores


def loss_chunks(batch: int, length: int, vocab_size: int, layout: Layout) -> int:
    """The chunks of a `[batch, length]` batch by what their float32 logits take (see `chunks_of`)."""
    share = layout.size("act_vocab") * layout.size("act_vocab_batch")
    return chunks_of(length, 4 * batch * length * vocab_size / share, layout)


def token_scores(
    logits: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    targets: jax.Array,
    layout: Layout,
    *,
    vocab_size: int,
    chunks: int,
    mean: bool = True,
) -> TokenScores:
    """The scores of `[B, T]` tokens.

    x: `[B, T, D]`, the input of `logits`, which gives `[b, t, V]`, of which the first `vocab_size` are tokens and the
    others −inf. targets: `[B, T]` int32; or keys, by each of which its token's target is drawn from the softmax of the
    logits: the draw depends on neither chunks nor layout. chunks: those of `loss_chunks`. mean: whether `mean_logit` is
    wanted. One chunk's logits exist at a time; where there are several, they are computed again in the backward pass.
    """

    def chunk_scores(x: jax.Array, targets: jax.Array) -> TokenScores:
        # The tokens are gathered over the axes that split the vocabulary, which is much less than the matrix.
        x = _gathered(x, layout)
        z = layout.constrain(logits(x), "act_vocab_batch", None, "act_vocab")
        vocabulary = jnp.arange(z.shape[-1])
        if jnp.issubdtype(targets.dtype, jax.dtypes.prng_key):
            targets = _drawn(targets, jax.lax.stop_gradient(z), layout)
        # A comparison keeps the vocabulary split; an index would gather it.
        target_logit = jnp.sum(jnp.where(targets[..., None] == vocabulary, z, 0), axis=-1)
        log_z = jax.nn.logsumexp(z, axis=-1)
        mean_logit = jnp.sum(jnp.where(vocabulary < vocab_size, z, 0), axis=-1) / vocab_size if mean else None
        return TokenScores(target_logit - log_z, log_z, mean_logit)

    if chunks == 1:
        return chunk_scores(x, targets)

    recomputed = jax.checkpoint(chunk_scores)
    split = tuple(in_chunks(a, chunks, layout) for a in (x, targets))
    parts = jax.lax.map(lambda chunk: recomputed(*chunk), split)
    return jax.tree.map(lambda part: joined(part, layout), parts)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, layout: Layout) -> jax.Array:
    """`x` `[B, T, D]`, whose gradient is scattered as it is summed: it would be summed whole, and then cut."""
    return layout.constrain(x, "act_vocab_batch", None, None)


_gathered.defvjp(
    lambda x, layout: (_gathered(x, layout), None),
    lambda layout, _, dx: (layout.constrain(dx, "batch", "act_length", rest_free=True),),
)


def _drawn(keys: jax.Array, z: jax.Array, layout: Layout) -> jax.Array:
    """A token drawn from the softmax of each row of logits: the largest after Gumbel noise is added.

    (Maddison et al., "A* Sampling", arXiv 1411.0030, section 2.)
    """
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, z.shape[-1:], z.dtype)))(keys)
    noise = layout.constrain(noise, "act_vocab_batch", None, "act_vocab")
    return jnp.argmax(z + noise, axis=-1)
