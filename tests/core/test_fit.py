"""A tree that is compared with the one that a model asks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import UserError
from jaxllm.core.fit import check_fits

WANTED = {
    "embed": {"table": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
    "ids": jax.ShapeDtypeStruct((3,), jnp.int32),
}


def array(shape: tuple[int, ...] = (8, 4), dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, jnp.dtype(dtype))


def check(table: object, ids: object = None, **how) -> None:
    found = {"embed": {"table": table}, "ids": array((3,), "int32") if ids is None else ids}
    check_fits(found, WANTED, what="it does not fit", remedy="Mend it", **how)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_floats_of_weights_fit_one_another(dtype):
    check(array(dtype=dtype))


def test_a_leaf_is_named_with_what_it_is_and_what_it_should_be():
    for table, message in (
        (array((9, 4)), r"embed/table has the shape \[9, 4\], and the model's is \[8, 4\]"),
        (array((4, 8)), r"embed/table has the shape \[4, 8\], and the model's is \[8, 4\]"),
        (array((32,)), r"embed/table has the shape \[32\], and the model's is \[8, 4\]"),
        (array(dtype="int32"), "embed/table is int32, and the model's is float32"),
        (array(dtype="bool"), "embed/table is bool, and the model's is float32"),
        (array(dtype="complex64"), "embed/table is complex64, and the model's is float32"),
        (array(dtype="float64"), "embed/table is float64, and the model's is float32"),
        (array(dtype="float8_e4m3fn"), "embed/table is float8_e4m3fn, and the model's is float32"),
        (jax.random.split(jax.random.key(0), (8, 4)), r"embed/table is key<\w+>, and the model's is float32"),
        (1.0, r"embed/table is a float, and the model's is an array, which has the shape \[8, 4\] and is float32"),
        (None, r"embed/table is missing, and the model's has the shape \[8, 4\] and is float32"),
        ([array()], "embed/table is missing, .*, and 1 more differ"),
        ({}, "embed/table is missing"),
    ):
        with pytest.raises(UserError, match=f"^it does not fit: {message}.*Mend it$"):
            check(table)


def test_whole_numbers_have_one_dtype():
    for dtype in ("int16", "uint32", "float32"):
        with pytest.raises(UserError, match=f"ids is {dtype}, and the model's is int32"):
            check(array(), array((3,), dtype), casts=True)


def test_a_leaf_that_the_model_has_not():
    with pytest.raises(UserError, match=r"the model has no head/kernel\. Mend it"):
        check_fits({**WANTED, "head": {"kernel": array()}}, WANTED, what="x", remedy="Mend it")


def test_what_is_cast_may_be_wider():
    check(array(dtype="float64"), casts=True)
    with pytest.raises(UserError, match="complex64"):
        check(array(dtype="complex64"), casts=True)


def test_padding_may_differ_along_its_axis_alone():
    padded = {"embed/table": (0, 7)}
    check(array((7, 4)), paddable=padded)
    check(array((16, 4)), paddable=padded)
    for shape in ((6, 4), (16, 5), (8, 7), (8, 4, 1)):
        with pytest.raises(UserError, match="embed/table has the shape"):
            check(array(shape), paddable=padded)
    moments = {"mu": {"embed": {"table": array((16, 4))}}}
    check_fits(moments, {"mu": {"embed": WANTED["embed"]}}, what="", remedy="", paddable=padded)
    other = {"lm_embed": {"table": array((16, 4))}}
    with pytest.raises(UserError, match="lm_embed/table"):
        check_fits(other, {"lm_embed": WANTED["embed"]}, what="", remedy="", paddable=padded)
