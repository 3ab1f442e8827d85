"""Matrices in 4 or 8 bits, with the bits of bitsandbytes (of its double quantisation the mean, to one rounding).

A matrix `[in, out]` is stored in other leaves in place of its `kernel`:

- NF4 (Dettmers et al., "QLoRA", arXiv 2305.14314, section 3): `nf4` `[in / 2, out]` uint8, of two weights of a column
  that follow each other, the first in the high bits; `nf4_scale` `[in / 64, out]`, the largest magnitude of each 64 of
  them, in float32; or, quantised again ("double quantisation"), in uint8, with `nf4_nested` `[in · out / 64 / 256]` and
  `nf4_offset`, a scalar, in float32: the scales of 256 scales of a column after the other, and their mean, which was
  taken away.
- int8 (Dettmers et al., "LLM.int8()", arXiv 2208.07339, section 2.1, "vector-wise"): `int8` `[in, out]`, and
  `int8_scale` `[out]` in float32, the largest magnitude of each column.
"""

from collections.abc import Mapping
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.mesh import Axes, Layout

BLOCK, NESTED_BLOCK = 64, 256

STORED = ("nf4", "nf4_scale", "nf4_nested", "nf4_offset", "int8", "int8_scale")
"""The leaves in place of a kernel."""

# The quantiles of a normal distribution, as bitsandbytes has them.
NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def quantize_nf4(kernel: jax.Array) -> dict[str, jax.Array]:
    """`nf4`, and `nf4_scale` in float32, of a matrix `[in, out]`, whose inputs 64 divides."""
    width, out = kernel.shape
    blocks = kernel.astype(jnp.float32).reshape(-1, BLOCK, out)
    scales = jnp.max(jnp.abs(blocks), axis=1)
    factors = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, 1 / scales)
    scaled = jnp.clip(blocks * factors[:, None], -1, 1).reshape(width, out)
    middles = (NF4[1:] + NF4[:-1]) / 2
    codes = reduce(jnp.add, ((scaled > middle).astype(jnp.uint8) for middle in middles))
    pairs = codes.reshape(-1, 2, out)
    return {"nf4": pairs[:, 0] << 4 | pairs[:, 1], "nf4_scale": scales}


def quantize_int8(kernel: jax.Array) -> dict[str, jax.Array]:
    """`int8` and `int8_scale` of a matrix `[in, out]`, of which float16 is taken, as bitsandbytes takes it."""
    kernel = kernel.astype(jnp.float16).astype(jnp.float32)
    scales = jnp.max(jnp.abs(kernel), axis=0)
    codes = jnp.round(kernel * jnp.where(scales == 0, 0, 1 / scales * 127)).astype(jnp.int8)
    return {"int8": codes, "int8_scale": scales}


def quantize_scales(scales: np.ndarray) -> dict[str, np.ndarray]:
    """`nf4_scale` in uint8, `nf4_nested` and `nf4_offset`, of the scales `[in / 64, out]` of a matrix in float32.

    On the host: they are few, and the same bits are wanted of every device and mesh.
    """
    flat = scales.T.reshape(-1)
    offset = np.asarray(flat.mean(dtype=np.float64), np.float32)
    flat = flat - offset
    starts = np.arange(0, flat.size, NESTED_BLOCK)
    nested = np.maximum.reduceat(np.abs(flat), starts)
    factors = np.repeat(np.divide(1, nested, where=nested > 0, out=np.zeros_like(nested)), NESTED_BLOCK)[: flat.size]
    scaled = np.clip(flat * factors, -1, 1)
    # A product and a sum that are rounded once: float64 holds the product of both exactly.
    places = ((scaled + 1) * np.float32(0.5)).astype(np.float64) * (_PLACES - 1) + 0.5
    codes = _PLACE_CODES[places.astype(np.float32).astype(np.int64)]
    codes = np.where(np.repeat(nested == 0, NESTED_BLOCK)[: flat.size], 0, codes).astype(np.uint8)
    codes = np.ascontiguousarray(codes.reshape(scales.T.shape).T)
    return {"nf4_scale": codes, "nf4_nested": nested, "nf4_offset": offset}


def stored_axes(name: str, shape: tuple[int, ...], axes: Axes, layout: Layout) -> Axes:
    """The names of the axes of the leaf `name` of a matrix with `axes`; None where `layout` does not divide its size.

    A mesh may divide the inputs of a matrix, and not their blocks: every device then holds the scales of all of them.
    """
    names = axes if name in ("nf4", "nf4_scale", "int8") else axes[1:] if name == "int8_scale" else (None,) * len(shape)
    return tuple(
        axis if axis and size % layout.size(axis) == 0 else None for axis, size in zip(names, shape, strict=True)
    )


def gathered(stored: Mapping[str, jax.Array], axes: Axes, layout: Layout) -> dict[str, jax.Array]:
    """The leaves of a matrix with `axes`, whole along the mesh axes over which sequences are split.

    So it is them that the devices send one another, and not the matrix that they hold.
    """
    whole = {name: tuple(a for a in layout.rules[name] if a not in layout.rules["batch"]) for name in axes if name}
    layout = layout.replace(**whole)
    return {name: layout.constrain(x, *stored_axes(name, x.shape, axes, layout)) for name, x in stored.items()}


def kernel_of(leaves: Mapping[str, jax.Array]) -> jax.Array:
    """The matrix `[in, out]` among the leaves of a layer, however it is stored."""
    return leaves["kernel"] if "kernel" in leaves else dequantized(leaves)


def dequantized(stored: Mapping[str, jax.Array]) -> jax.Array:
    """The matrix `[in, out]` that the leaves `stored` hold, in float32."""
    if "int8" in stored:
        return stored["int8"] * stored["int8_scale"] * np.float32(1 / 127)
    codes = stored["nf4"]
    pairs = jnp.stack([codes >> 4, codes & 15], axis=1)
    blocks = _looked_up(NF4, pairs).reshape(-1, BLOCK, codes.shape[1])
    return (blocks * _scales(stored)[:, None]).reshape(-1, codes.shape[1])


def _scales(stored: Mapping[str, jax.Array]) -> jax.Array:
    """The scales of the blocks, `[in / 64, out]` in float32."""
    scale = stored["nf4_scale"]
    if "nf4_nested" not in stored:
        return scale
    nested = jnp.repeat(stored["nf4_nested"], NESTED_BLOCK)[: scale.size].reshape(scale.shape[::-1]).T
    # The maximum changes nothing: without it the compiler would round the product with the sum, and not before it.
    product = jnp.maximum(_looked_up(DYNAMIC, scale) * nested, jnp.finfo(jnp.float32).min)
    return product + stored["nf4_offset"]


def _looked_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")


def _dynamic_map() -> np.ndarray:
    """The 256 values of an 8-bit number with a sign, an exponent and a fraction whose bits it shares (Dettmers, "8-Bit
    Approximations for Parallelism in Deep Learning", arXiv 1511.04561, section 2), in rising order."""
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    first = np.float32(0.1)
    for exponent in range(7):
        count = 2**exponent
        step = np.float64((1 - first) / np.float32(count))
        i = np.arange(count + 1)
        # Evenly from both ends, each rounded once, as torch does it.
        edges = np.where(i < (count + 1) // 2, first + step * i, 1 - step * (count - i)).astype(np.float32)
        means = np.float32(10.0 ** (exponent - 6)) * ((edges[:-1] + edges[1:]) / 2)
        values += [means, -means]
    return np.sort(np.concatenate(values))


DYNAMIC = _dynamic_map()

# bitsandbytes looks the nearest value up by the first 16 bits of where a number lies between −1 and 1.
_PLACES = 2**16


def _place_codes() -> np.ndarray:
    places = np.float32(-1) + np.arange(0, 2 * _PLACES, 2, dtype=np.float32) / np.float32(_PLACES - 1)
    middles = np.float32(0.5) * (DYNAMIC[:-1] + DYNAMIC[1:])
    return np.searchsorted(middles, places).astype(np.uint8)


_PLACE_CODES = _place_codes()
