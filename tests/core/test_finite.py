"""Weights that no model can compute with."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import UserError
from jaxllm.core.finite import check_finite


def weights(dtype: str, value: float) -> dict:
    leaf = np.ones((3, 5), jnp.dtype(dtype))
    leaf[1, 2] = value
    return {"norm": {"scale": leaf}, "embed": {"table": np.ones(4, np.float32), "ids": np.full(3, 2**31 - 1)}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_is_enough(dtype, value):
    with pytest.raises(UserError, match=r"^m: norm/scale has numbers that are NaN, .* squares are\. Mend it$"):
        check_finite(weights(dtype, value), "m", "Mend it")


def test_a_number_whose_square_overflows_is_no_better():
    """The largest float32 is 3.4e38, the square of 1.8e19."""
    check_finite(weights("float32", 1.8e19), "m", "Mend it")
    check_finite(weights("float16", 65504), "m", "Mend it")
    for dtype, value in (("float32", 1.9e19), ("bfloat16", -3e38)):
        with pytest.raises(UserError, match="norm/scale"):
            check_finite(weights(dtype, value), "m", "Mend it")
