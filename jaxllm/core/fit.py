"""Whether a tree of arrays has the leaves that a model asks for."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.core import tree
from jaxllm.core.errors import UserError

# Weights are used and written in any of these, whichever of them the model asks for.
_WEIGHT_DTYPES = ("float32", "bfloat16", "float16")

Paddable = Mapping[str, tuple[int, int]]
"""By path, the axis of a parameter that a mesh may pad, and the size of that axis without padding."""


def check_fits(
    found: Any, wanted: Any, *, what: str, remedy: str, paddable: Paddable | None = None, casts: bool = False
) -> None:
    """Raises UserError unless `found` has the leaves of `wanted`: the same paths and shapes, and dtypes that fit.

    Both are trees of arrays or of what describes them. A dtype fits if it is the wanted one, or if both are floats and
    it is float32, bfloat16 or float16. what, remedy: the message's beginning and end; it names the first leaf that
    differs, what it is and what it should be.

    paddable: the leaves of these paths, and an optimizer's leaves whose paths end like them, may have another size
        along that axis, as long as the real entries are there on both sides.
    casts: whether floats of any width fit, because they are cast.
    """
    here, there = tree.flatten(found), tree.flatten(wanted)
    problems = [
        f"{path} is missing, and the model's has {_described(leaf)}" for path, leaf in there.items() if path not in here
    ]
    problems += [f"the model has no {path}" for path in here if path not in there]
    for path in (path for path in there if path in here):
        problems += _difference(path, here[path], there[path], paddable or {}, casts)
    if problems:
        more = f", and {len(problems) - 1} more differ" if problems[1:] else ""
        raise UserError(f"{what}: {problems[0]}{more}. {remedy}")


def _difference(path: str, found: Any, wanted: Any, paddable: Paddable, casts: bool) -> list[str]:
    """What is wrong with a leaf, if anything is."""
    if not hasattr(found, "shape") or not hasattr(found, "dtype"):
        return [f"{path} is a {type(found).__name__}, and the model's is an array, which has {_described(wanted)}"]
    shape, asked = tuple(found.shape), tuple(wanted.shape)
    if shape != asked and not _differs_in_padding(path, shape, asked, paddable):
        return [f"{path} has the shape {list(shape)}, and the model's is {list(asked)}"]
    if not _dtype_fits(found.dtype, wanted.dtype, casts):
        return [f"{path} is {found.dtype}, and the model's is {wanted.dtype}"]
    return []


def _differs_in_padding(path: str, shape: tuple[int, ...], asked: tuple[int, ...], paddable: Paddable) -> bool:
    for name, (axis, real) in paddable.items():
        if f"/{path}".endswith(f"/{name}") and len(shape) == len(asked):
            rest = shape[:axis] + shape[axis + 1 :] == asked[:axis] + asked[axis + 1 :]
            return rest and min(shape[axis], asked[axis]) >= real
    return False


def _dtype_fits(found: Any, wanted: Any, casts: bool) -> bool:
    if found == wanted:
        return True
    if not isinstance(found, np.dtype):  # a random key's, or another library's
        return False
    floats = jnp.issubdtype(found, jnp.floating) and jnp.issubdtype(wanted, jnp.floating)
    return floats and (casts or found.name in _WEIGHT_DTYPES)


def _described(leaf: Any) -> str:
    return f"the shape {list(leaf.shape)} and is {leaf.dtype}"
