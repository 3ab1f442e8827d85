"""What callers of a model give it in place of tokens, positions and segments: checked before JAX is asked."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer


def check_token_arrays(tokens: Any, others: Mapping[str, Any], vocab_size: int) -> None:
    """Raises ValueError unless `tokens` are ids of a vocabulary, `[B, T]`, and `others` are of the same shape.

    others: further arrays by their names; None is left out. Values are looked at where they are known, which they are
    not under `jax.jit`: ids must be from 0 to below `vocab_size`, and the other arrays not negative.
    """
    given = {"tokens": tokens, **{name: array for name, array in others.items() if array is not None}}
    for name, array in given.items():
        if not isinstance(array, np.ndarray | jax.Array):
            raise ValueError(
                f"{name} must be an array of numpy or JAX of the shape [B, T], got a {type(array).__name__}"
            )
        if array.ndim != 2 or array.shape != tokens.shape or array.dtype.kind not in "iu":
            raise ValueError(
                f"{name} must be whole numbers of the shape [B, T]{'' if name == 'tokens' else ' of tokens'}; "
                f"got {array.dtype} {tuple(array.shape)}, and tokens are {tuple(tokens.shape)}"
            )
        if array.size == 0:
            raise ValueError(f"{name} are empty, of the shape {tuple(array.shape)}; give at least one row of one token")
        if isinstance(array, Tracer):
            continue
        lowest, highest = int(array.min()), int(array.max())
        if lowest < 0:
            raise ValueError(f"{name} must not be negative, got {lowest}")
        if name == "tokens" and highest >= vocab_size:
            raise ValueError(
                f"tokens must be ids below {vocab_size}, the size of the model's vocabulary, got {highest}; use the "
                "model's own tokenizer"
            )
