"""Token embeddings."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.mesh import Layout
from jaxllm.nn.chunks import chunks_of, in_chunks, joined
from jaxllm.nn.context import Context
from jaxllm.nn.linear import ADAPTER, with_low_rank
from jaxllm.nn.parameter import parameter
from jaxllm.nn.prompt import virtual_tokens

TOKEN_ROWS, TOKEN_IDS = "token_rows", "token_ids"
BESIDE = (*ADAPTER, TOKEN_ROWS, TOKEN_IDS)
"""The leaves of adapters that are read wherever they lie beside a parameter of the model."""


class Embed(nn.Module):
    """A table `[vocab, D]` of token embeddings.

    Of an adapter it applies the leaves that it finds, and makes none: `prompt` `[n, D]`, embeddings of n virtual tokens
    that stand in front of every row; with `prompt_encoder` besides, they are what that makes of them; `token_rows`
    `[k, D]`, which stand in the place of the rows `token_ids` `[k]` of the table; the leaves `lora_…` of `nn.linear`,
    of which the table is the kernel `[vocab, D]`.

    scale: what embeddings of tokens are multiplied by, which the `prompt` is not.
    """

    vocab_size: int
    features: int
    dtype: DTypeLike
    stddev: float
    scale: float = 1.0

    @nn.compact
    def __call__(self, tokens: jax.Array, ctx: Context) -> jax.Array:
        """`[B, T]` → `[B, T, D]` in the compute dtype; `[B, n + T, D]` where virtual tokens stand in front, unless the
        rows began in another pass."""
        layout, normal = ctx.layout, nn.initializers.normal(self.stddev)
        table = parameter(self, "table", normal, ("vocab", "vocab_embed"), (self.vocab_size, self.features))
        x = _rows(table, tokens, layout).astype(self.dtype)
        adapter = {name: self.get_variable("params", name) for name in ADAPTER if self.has_variable("params", name)}
        if "lora_a" in adapter:

            def look_up(tokens: jax.Array, table: jax.Array) -> jax.Array:
                return _rows(table, tokens, layout).astype(self.dtype)

            x = with_low_rank(x, tokens, table, adapter, look_up)
        if self.has_variable("params", TOKEN_ROWS):
            same = tokens[..., None] == self.get_variable("params", TOKEN_IDS)
            rows = self.get_variable("params", TOKEN_ROWS).astype(self.dtype)
            x = jnp.where(same.any(axis=-1, keepdims=True), rows[jnp.argmax(same, axis=-1)], x)
        if self.scale != 1:
            x *= jnp.asarray(self.scale, self.dtype)
        if ctx.begins and self.has_variable("params", "prompt"):
            has_encoder = self.has_variable("params", "prompt_encoder")
            encoder = self.get_variable("params", "prompt_encoder") if has_encoder else None
            prompt = virtual_tokens(self.get_variable("params", "prompt"), encoder).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(prompt, (len(x), *prompt.shape)), x], axis=1)
        return layout.constrain(x, "batch", "act_length", "act_embed")


def _rows(table: jax.Array, tokens: jax.Array, layout: Layout) -> jax.Array:
    """The rows `[B, T, D]` of `tokens`, in chunks where many are found at a time."""

    def of_chunk(tokens: jax.Array) -> jax.Array:
        # The tokens are gathered over the axes that split the vocabulary, and what they find is scattered; the compiler
        # would gather the table where that is smaller.
        everywhere = layout.constrain(tokens, "act_vocab_batch", None)
        return layout.constrain(jnp.take(table, everywhere, axis=0, mode="clip"), "act_vocab_batch", None, None)

    size = table.shape[1] * table.dtype.itemsize / layout.size("act_vocab_batch")
    chunks = chunks_of(tokens.shape[1], tokens.size * size, layout)
    if chunks == 1:
        return of_chunk(tokens)

    def scattered(tokens: jax.Array) -> jax.Array:
        return layout.constrain(of_chunk(tokens), "batch", "act_length", "act_embed")

    return joined(jax.lax.map(scattered, in_chunks(tokens, chunks, layout)), layout)
