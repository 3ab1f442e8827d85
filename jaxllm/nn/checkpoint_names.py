"""Names of a block's intermediate results, by which a rematerialisation policy says what it saves."""

from typing import Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name

TensorName = Literal[
    "attn_q", "attn_k", "attn_v", "attn_context", "attn_out", "mlp_gate", "mlp_up", "mlp_hidden", "mlp_out"
]

TENSOR_NAMES: tuple[TensorName, ...] = get_args(TensorName)


def named(x: jax.Array, name: TensorName) -> jax.Array:
    """`x` itself."""
    return checkpoint_name(x, name)
