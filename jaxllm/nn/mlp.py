"""Feed-forward layers."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
from jax.typing import DTypeLike

from jaxllm.nn.checkpoint_names import named
from jaxllm.nn.context import Context
from jaxllm.nn.linear import Linear

# Named as in Hugging Face configs, where "gelu" is the exact form.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer, arXiv 2002.05202).

    fused: whether gate and up are one matrix `gate_up`, whose columns have each of the gate before that of up.
    """

    features: int
    activation: str
    use_bias: bool
    stddev: float
    dtype: DTypeLike
    fused: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        """`[B, T, D]` → `[B, T, D]`."""

        def linear(features: int, axes: tuple[str, str], name: str) -> Linear:
            return Linear(features, axes, self.dtype, self.stddev, self.use_bias, name=name)

        axes = ("embed", "mlp")
        if self.fused:
            pairs = linear(2 * self.features, axes, "gate_up")(x, ctx).reshape(*x.shape[:-1], self.features, 2)
            gate, up = pairs[..., 0], pairs[..., 1]
        else:
            gate, up = (linear(self.features, axes, name)(x, ctx) for name in ("gate", "up"))
        gate, up = named(gate, "mlp_gate"), named(up, "mlp_up")
        hidden = ctx.layout.constrain(ACTIVATIONS[self.activation](gate) * up, "batch", "act_inner_length", "act_mlp")
        return named(linear(x.shape[-1], ("mlp", "embed"), "down")(named(hidden, "mlp_hidden"), ctx), "mlp_out")
