"""The one place that multiplies by a weight, and by the leaves that an adapter has put beside it."""

import zlib
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core.dtypes import at_least_float32
from jaxllm.nn.context import Context
from jaxllm.nn.parameter import parameter
from jaxllm.nn.quantized import STORED, gathered, kernel_of


class Linear(nn.Module):
    """`x @ kernel + bias`, with the kernel stored as the matrix `[in, out]`.

    axes: the logical axes of the kernel; the bias has the last of them. In place of the kernel there may be the leaves
    of one in 4 or 8 bits (`nn.quantized`), which it is read back from in each product, and which get no gradient.

    Of an adapter it applies the leaves that it finds, and makes none:

    - `lora_a` `[in, r]`, `lora_b` `[r, out]`, `lora_scale` (a scalar, s): `x @ kernel + s · x @ lora_a @ lora_b`
      (Hu et al., arXiv 2106.09685);
    - `lora_e` `[r]` besides: the columns of lora_a multiplied by it (Zhang et al., arXiv 2303.10512, equation 3);
    - `lora_a_start`, `lora_b_start` besides: s · x @ lora_a_start @ lora_b_start is taken away, so that a part of the
      kernel itself trains where lora_a and lora_b start as they are (Meng et al., arXiv 2404.02948);
    - `lora_magnitude` `[out]` besides: the columns of kernel + s · lora_a @ lora_b, divided by their norms (which get
      no gradient) and multiplied by it (Liu et al., arXiv 2402.09353, equations 5 and 11);
    - `ia3_in` `[in]`, `ia3_out` `[out]`: x and the result, bias included, multiplied by them (Liu et al., arXiv
      2205.05638); where `ia3_on`, a scalar, is there and 0, they are not.
    """

    features: int
    axes: tuple[str, str]
    dtype: DTypeLike
    stddev: float
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """`[..., in]` → `[..., out]` in the compute dtype."""
        shape = (x.shape[-1], self.features)
        stored = {name: self.get_variable("params", name) for name in STORED if self.has_variable("params", name)}
        if not stored:
            stored = {"kernel": parameter(self, "kernel", nn.initializers.normal(self.stddev), self.axes, shape)}
        adapter = {name: self.get_variable("params", name) for name in ADAPTER if self.has_variable("params", name)}
        if "ia3_in" in adapter:
            x = x * _ia3_factor("ia3_in", adapter).astype(self.dtype)
        y = self._times_kernel(x, stored, ctx)
        if "lora_a" in adapter:
            y += self._adapted(x, y, stored, adapter, ctx)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros_init(), self.axes[1:], (self.features,))
            y += bias.astype(self.dtype)
        if "ia3_out" in adapter:
            y = y * _ia3_factor("ia3_out", adapter).astype(self.dtype)
        return y

    def _adapted(
        self,
        x: jax.Array,
        y: jax.Array,
        stored: Mapping[str, jax.Array],
        adapter: Mapping[str, jax.Array],
        ctx: Context,
    ) -> jax.Array:
        """What the matrices of low rank add to y = `x @ kernel`. They see x after their own dropout."""
        drop = ctx.adapter_dropout
        if drop is not None:
            x = drop.at(zlib.crc32("/".join(self.path).encode()) & 0x7FFFFFFF)(x)
        a, b = (half.astype(self.dtype) for half in _halves(adapter))
        product = _product(ctx)
        added = product(product(x, a), b) * adapter["lora_scale"].astype(self.dtype)
        if "lora_magnitude" not in adapter:
            return added
        kernel = kernel_of(self._gathered(stored, ctx))
        kernel = kernel.astype(jnp.promote_types(kernel.dtype, self.dtype))
        factor = _column_factors(kernel, adapter).astype(self.dtype)
        seen = y if drop is None else self._times_kernel(x, stored, ctx)
        return (factor - 1) * seen + factor * added

    def _times_kernel(self, x: jax.Array, stored: Mapping[str, jax.Array], ctx: Context) -> jax.Array:
        """`x @ kernel` in the compute dtype."""

        def product(x: jax.Array, stored: Mapping[str, jax.Array]) -> jax.Array:
            return _product(ctx)(x, kernel_of(self._gathered(stored, ctx)).astype(self.dtype))

        # What was read back is read back again for the backward pass, which would else keep that of every layer.
        return product(x, stored) if "kernel" in stored else jax.checkpoint(product)(x, stored)

    def _gathered(self, stored: Mapping[str, jax.Array], ctx: Context) -> Mapping[str, jax.Array]:
        return stored if "kernel" in stored else gathered(stored, self.axes, ctx.layout)


ADAPTER = (
    *("lora_a", "lora_b", "lora_scale", "lora_magnitude", "lora_a_start", "lora_b_start", "lora_e"),
    *("ia3_in", "ia3_out", "ia3_on"),
)
"""The leaves of adapters that stand beside a kernel."""


def merged_kernel(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
    """The kernel `[in, out]` by which a layer multiplies as it does with `adapter` (see `Linear`)."""
    merged = kernel.astype(at_least_float32(kernel.dtype))
    if "lora_a" in adapter:
        merged = _low_rank_sum(kernel, adapter)
    if "lora_magnitude" in adapter:
        merged *= _column_factors(kernel, adapter)
    if "ia3_in" in adapter:
        merged *= _ia3_factor("ia3_in", adapter)[:, None]
    if "ia3_out" in adapter:
        merged *= _ia3_factor("ia3_out", adapter)
    return merged.astype(kernel.dtype)


def merged_bias(bias: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
    """The bias `[out]` of such a layer."""
    return (bias * _ia3_factor("ia3_out", adapter)).astype(bias.dtype) if "ia3_out" in adapter else bias


def _halves(adapter: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The matrices `[in, r]` and `[r, out]` whose product is added, of twice the rank where something is taken away."""
    a, b = adapter["lora_a"], adapter["lora_b"]
    if "lora_e" in adapter:
        a = a * adapter["lora_e"]
    if "lora_a_start" in adapter:
        a = jnp.concatenate([a, adapter["lora_a_start"]], axis=1)
        b = jnp.concatenate([b, -adapter["lora_b_start"]], axis=0)
    return a, b


def _low_rank_sum(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
    dtype = at_least_float32(kernel.dtype)
    a, b = (half.astype(dtype) for half in _halves(adapter))
    return kernel.astype(dtype) + adapter["lora_scale"].astype(dtype) * (a @ b)


def _column_factors(kernel: jax.Array, adapter: Mapping[str, jax.Array]) -> jax.Array:
    """lora_magnitude over the norms of the columns. It is 1 for columns of zeros, and in a layer without the adapter,
    whose scale is 0."""
    norms = jax.lax.stop_gradient(jnp.linalg.norm(_low_rank_sum(kernel, adapter), axis=0))
    alone = (adapter["lora_scale"] == 0) | (norms == 0)  # columns of zeros pad the vocabulary
    return jnp.where(alone, 1, adapter["lora_magnitude"] / jnp.where(alone, 1, norms))


def _ia3_factor(name: str, adapter: Mapping[str, jax.Array]) -> jax.Array:
    return jnp.where(adapter["ia3_on"] == 0, 1, adapter[name]) if "ia3_on" in adapter else adapter[name]


def with_low_rank(
    y: jax.Array,
    x: jax.Array,
    kernel: jax.Array,
    adapter: Mapping[str, jax.Array],
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """y, the product of x and `kernel`, with what the matrices of low rank do to it.

    product: of x and a matrix `[in, n]`, which for an embedding looks up its rows.
    """
    a, b = _halves(adapter)
    y += multiply(product(x, a), b.astype(y.dtype), y.dtype) * adapter["lora_scale"].astype(y.dtype)
    return y * _column_factors(kernel, adapter).astype(y.dtype) if "lora_magnitude" in adapter else y


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel` multiplied in x's dtype and accumulated in at least float32."""
    return multiply(x, kernel.astype(x.dtype), at_least_float32(x.dtype))


def multiply(x: jax.Array, kernel: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """`[..., in]` times `[in, out]`, in `dtype` where one is given."""
    # As a product of matrices: of a batch of them, XLA's CPU backend copies every operand of the backward pass into
    # another order first, which made a feed-forward layer's gradient 1.7 times as slow.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, preferred_element_type=dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _product(ctx: Context) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`multiply`, or what it computes by a batch of products."""
    # Where the length is split between the products, their sums over the tensor axis are to be reduced and scattered
    # in one; behind the reshape of `multiply` XLA reduces them whole.
    return jnp.matmul if ctx.layout.size("act_length") > 1 else multiply
