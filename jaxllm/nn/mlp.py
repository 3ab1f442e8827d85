"""Feed-forward layers."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from jaxllm.nn.context import Context
from jaxllm.nn.linear import Linear
from jaxllm.nn.named import named

# Named as in Hugging Face configs, where "gelu" is the exact form.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202)."""

    features: int
    activation: str
    use_bias: bool
    stddev: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """`[B, T, D]` → `[B, T, D]`."""

        def linear(features: int, axes: tuple[str, str], name: str) -> Linear:
            return Linear(features, axes, self.dtype, self.stddev, self.use_bias, name=name)

        gate = named(linear(self.features, ("embed", "mlp"), "gate")(x, ctx), "mlp_gate")
        up = named(linear(self.features, ("embed", "mlp"), "up")(x, ctx), "mlp_up")
        hidden = ctx.layout.constrain(ACTIVATIONS[self.activation](gate) * up, "batch", "act_inner_length", "act_mlp")
        return named(linear(x.shape[-1], ("mlp", "embed"), "down")(named(hidden, "mlp_hidden"), ctx), "mlp_out")
