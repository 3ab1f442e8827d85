"""What a block sees: the data of its own layer, in every part of a batch."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.mesh import Layout
from jaxllm.nn.context import Context, LayerData


def test_a_layer_sees_its_own_data_in_every_part_of_a_batch():
    rope = (np.zeros((4, 3, 2)), np.zeros((4, 3, 2)))
    layers = LayerData(window=np.array([8, 2]), rope=np.array([0, 1]))
    ctx = Context(Layout.single(), rope, layers=layers)
    own = ctx.of_layer(1)
    assert (own.window, own.rope_index, own.layers) == (2, 1, None)

    parts = ctx.in_parts(2, lambda a: a.reshape(2, -1, *a.shape[1:]))
    assert parts.rope[0].shape == (2, 2, 3, 2)
    windows = jax.vmap(lambda ctx, index: ctx.of_layer(index).window)(parts, jnp.arange(2))
    np.testing.assert_array_equal(windows, [8, 2])


def test_a_model_of_equal_layers_carries_no_data_of_layers():
    ctx = Context(Layout.single(), (np.zeros((1, 1, 1)), np.zeros((1, 1, 1))))
    own = ctx.of_layer(0)
    assert jax.tree.structure(own) == jax.tree.structure(ctx)
