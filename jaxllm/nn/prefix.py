"""The encoder that makes the keys and values of virtual tokens for all layers."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Where its leaves are among the parameters of a model.
FOLDER = "prefix"


def projected_prefix(encoder: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Keys and values `[layers, n, size]` (Li and Liang, arXiv 2101.00190, section 4.3).

    encoder: `embedding` `[n, size]`; `hidden`, which all layers share; `k` and `v`, with a leading axis of layers;
    `kernel` and `bias` each.
    """
    hidden = jnp.tanh(encoder["embedding"] @ encoder["hidden"]["kernel"] + encoder["hidden"]["bias"])

    def of_layers(out: Mapping[str, jax.Array]) -> jax.Array:
        return hidden @ out["kernel"] + out["bias"][:, None]

    return of_layers(encoder["k"]), of_layers(encoder["v"])
