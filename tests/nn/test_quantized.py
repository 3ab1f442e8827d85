"""Matrices in 4 or 8 bits: each bit against bitsandbytes on the CPU."""

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm.nn import quantized


def weights(out: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix as transformers has it, `[out, in]`, with a block of zeros, one of negative zeros, and an outlier."""
    w = 0.05 * torch.randn(out, width, generator=torch.Generator().manual_seed(out))
    w[0, :64] = 0
    w[out // 2, -64:] = -0.0
    w[out - 1, 3] = 300.0
    return w.to(dtype)


def kernel(w: torch.Tensor) -> jax.Array:
    return jnp.asarray(w.float().numpy().T, jnp.dtype(str(w.dtype).removeprefix("torch.")))


def in_order(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """What stands as `[…, out]` in the order of torch's matrix, which has its rows one after the other."""
    return np.asarray(leaf).T.reshape(-1)


SHAPES = [(1, 64), (3, 128), (16, 512), (40, 448), (700, 4096)]  # blocks fewer than 8, than 256, and more than 32,768


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_is_that_of_bitsandbytes(shape, dtype):
    w = weights(*shape, dtype)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=False, quant_type="nf4")
    stored = jax.jit(quantized.quantize_nf4)(kernel(w))
    np.testing.assert_array_equal(in_order(stored["nf4"]), theirs.numpy()[:, 0])
    np.testing.assert_array_equal(in_order(stored["nf4_scale"]), state.absmax.numpy())
    again = jax.jit(lambda stored: quantized.dequantized(stored).astype(kernel(w).dtype))(stored)
    wanted = bnb.dequantize_4bit(theirs, state)
    assert wanted.dtype == dtype
    np.testing.assert_array_equal(np.asarray(again, np.float32).T, wanted.float().numpy())


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_doubly_quantised_scales_are_those_of_bitsandbytes(shape, dtype):
    """But for the rounding of their mean, which torch sums in float32 in an order of its own."""
    w = weights(*shape, dtype)
    _, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = np.asarray(jax.jit(quantized.quantize_nf4)(kernel(w))["nf4_scale"])
    stored = quantized.quantize_scales(scales)
    rounding = 4 * np.spacing(np.float32(scales.max()))
    np.testing.assert_allclose(stored["nf4_offset"], state.offset.numpy(), atol=rounding, rtol=0)
    np.testing.assert_allclose(stored["nf4_nested"], state.state2.absmax.numpy(), atol=rounding, rtol=0)
    codes = in_order(stored["nf4_scale"]).astype(int), state.absmax.numpy().astype(int)
    # A number in the middle of two codes may get either.
    assert np.abs(codes[0] - codes[1]).max() <= 1
    assert (codes[0] != codes[1]).mean() <= 1e-3
    again = jax.jit(quantized._scales)({name: jnp.asarray(leaf) for name, leaf in stored.items()})
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    errors = [np.abs(found - in_order(scales)) for found in (in_order(again), theirs.numpy())]
    assert (errors[0] <= errors[1] + rounding).all()


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_that_of_bitsandbytes(dtype):
    w = weights(64, 384, dtype)
    w[5] = 0
    theirs, stats, _ = bnb.int8_vectorwise_quant(w.to(torch.float16))
    stored = jax.jit(quantized.quantize_int8)(kernel(w))
    np.testing.assert_array_equal(stored["int8"].T, theirs.numpy())
    np.testing.assert_array_equal(stored["int8_scale"], stats.numpy())
    again = jax.jit(quantized.dequantized)(stored)
    np.testing.assert_array_equal(again.T, bnb.int8_vectorwise_dequant(theirs, stats).numpy())


def test_scales_of_a_matrix_of_zeros():
    """Which bitsandbytes stores as 0 too."""
    w = torch.zeros(4, 128)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    stored = quantized.quantize_nf4(kernel(w))
    np.testing.assert_array_equal(in_order(stored["nf4"]), theirs.numpy()[:, 0])
    scales = quantized.quantize_scales(np.asarray(stored["nf4_scale"]))
    np.testing.assert_array_equal(in_order(scales["nf4_scale"]), state.absmax.numpy())
    assert not scales["nf4_nested"].any()
    assert scales["nf4_offset"] == state.offset.numpy() == 0


def test_the_tables_are_those_of_bitsandbytes():
    np.testing.assert_array_equal(quantized.NF4, bnb.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(quantized.DYNAMIC, bnb.create_dynamic_map().numpy())
