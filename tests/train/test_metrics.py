"""Operations per token, counted by hand and by XLA, and the devices' peak."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.hardware import peak_flops
from jaxllm.core.mesh import Layout
from jaxllm.models.stack import loop
from jaxllm.train.metrics import flops_per_token
from tests.support.families import mesh_layout, small_lm
from tests.support.small_runs import llama

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB, LENGTH = 2, 32, 8, 2, 4, 48, 101, 64
ATTENTION = WIDTH * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
PARAMETERS = VOCAB * WIDTH + LAYERS * (ATTENTION + 3 * WIDTH * HIDDEN + 2 * WIDTH) + WIDTH
ATTENDING = LAYERS * HEADS * HEAD_DIM * LENGTH


@pytest.mark.parametrize("layout", [Layout.single(), mesh_layout(tensor=2, fsdp=4)], ids=["one device", "eight"])
def test_operations_of_a_token(layout):
    """6 a parameter, whether or not the embedding is used twice, and 12 a pair of head dimension and token seen.

    What a mesh adds to the vocabulary is not counted.
    """
    tied = small_lm(llama(num_key_value_heads=KV_HEADS, tie_word_embeddings=True), layout)
    untied = small_lm(llama(num_key_value_heads=KV_HEADS), layout)
    for lm, parameters in ((tied, PARAMETERS), (untied, PARAMETERS + VOCAB * WIDTH)):
        assert lm.parameter_count() == parameters
        assert flops_per_token(lm, LENGTH) == (
            6 * parameters + 12 * ATTENDING,
            6 * parameters + 6 * ATTENDING,
        )


def test_operations_are_three_times_those_that_xla_counts_forward():
    """Of a tied model, whose every matrix is multiplied once; norms and softmax are what is left.

    XLA multiplies masked scores too, so it counts attention whole.
    """
    wide = dict(hidden_size=256, intermediate_size=512, head_dim=32)
    lm = small_lm(llama(tie_word_embeddings=True, **wide))
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    def forward(params, tokens):
        positions = jnp.arange(LENGTH)[None]
        return lm.head(params, lm.hidden(params, tokens, lm.context(positions), loop())[0])

    counted = jax.jit(forward).lower(lm.abstract(), tokens).cost_analysis()["flops"]
    np.testing.assert_allclose(flops_per_token(lm, LENGTH)[0] * LENGTH, 3 * counted, rtol=0.02)


def test_the_peak_of_known_and_unknown_devices():
    def layout(kind: str, count: int) -> SimpleNamespace:
        return SimpleNamespace(mesh=SimpleNamespace(devices=np.array([SimpleNamespace(device_kind=kind)] * count)))

    assert peak_flops(layout("NVIDIA H200", 8)) == 8 * 989e12
    assert peak_flops(layout("NVIDIA A100-SXM4-80GB", 1)) == 312e12
    # Names that hold another card's.
    assert peak_flops(layout("NVIDIA H100 PCIe", 1)) == 756e12
    assert peak_flops(layout("NVIDIA H100 80GB HBM3", 2)) == 2 * 989e12
    assert peak_flops(layout("NVIDIA A10G", 1)) == 70e12
    assert peak_flops(layout("NVIDIA L40S", 1)) == 362e12
    assert peak_flops(layout("NVIDIA GB200", 4)) == 4 * 2500e12
    assert peak_flops(layout("NVIDIA A1000 Laptop GPU", 1)) is None
    assert peak_flops(Layout.single()) is None
