"""The encoders that make the embeddings of virtual tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Encoder = Mapping[str, Any]


def virtual_tokens(prompt: jax.Array, encoder: Encoder | None = None) -> jax.Array:
    """The embeddings `[n, D]` of virtual tokens: `prompt` itself, or what `encoder` makes of it.

    encoder: layers `linear_0 … linear_k`, `kernel` `[in, out]` and `bias` `[out]` each, with a ReLU between two of
    them; before them, where they are there, the layers `lstm_0 … lstm_k` of an LSTM of both directions (see `_lstm`),
    whose hidden states stand side by side (Liu et al., arXiv 2103.10385, eq. 5).
    """
    if encoder is None:
        return prompt
    x, layer = prompt, 0
    while f"lstm_{layer}" in encoder:
        both = encoder[f"lstm_{layer}"]
        backward = _lstm(both["backward"], x[::-1])[::-1]
        x, layer = jnp.concatenate([_lstm(both["forward"], x), backward], axis=-1), layer + 1
    last = sum(name.startswith("linear_") for name in encoder) - 1
    for i in range(last + 1):
        x = x @ encoder[f"linear_{i}"]["kernel"] + encoder[f"linear_{i}"]["bias"]
        x = x if i == last else jax.nn.relu(x)
    return x


def _lstm(layer: Encoder, x: jax.Array) -> jax.Array:
    """The hidden states `[n, H]` of an LSTM that reads `x` `[n, in]` (Hochreiter and Schmidhuber, 1997, with the forget
    gate of Gers et al., 2000). The gates stand side by side in the order of torch: input, forget, cell, output."""
    recurrent = layer["recurrent"]["kernel"]

    def step(state: tuple[jax.Array, jax.Array], row: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        h, c = state
        i, f, g, o = jnp.split(row + h @ recurrent, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(recurrent.shape[:1], x.dtype)
    return jax.lax.scan(step, (zero, zero), x @ layer["input"]["kernel"] + layer["bias"])[1]
