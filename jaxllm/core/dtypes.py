"""Which precision a computation runs in."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

DTypeName = Literal["float64", "float32", "bfloat16", "float16"]


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """The dtype of norms, softmax, rope angles, logits, losses and optimizer arithmetic for inputs of `dtype`.

    float32 for float16, bfloat16 and float32; float64 stays float64, so that equality tests can run in it.
    """
    return jnp.promote_types(dtype, jnp.float32)
