"""Sequence parallelism: what is between the products of matrices is split along the length over the tensor axis."""

import jax
import pytest

from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.optim.build import AdaLomo
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.lora import Lora
from tests.support.families import mesh_layout
from tests.support.small_runs import assert_trained_alike, llama, program, train

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10
ADALOMO = AdaLomo(type="adalomo", learning_rate=1e-2, schedule=Constant(type="constant"))
HOW = {
    "ordinary": dict(micro_batches=4),
    "fused": dict(fused=True, optimizer=ADALOMO),
    "lora": dict(method=Lora(type="lora", r=2, target_modules="all-linear"), micro_batches=2),
}


def split(layout: Layout) -> Layout:
    return layout.replace(act_length=("context", "tensor"))


@pytest.mark.parametrize("how", ["ordinary", *(pytest.param(how, marks=pytest.mark.full) for how in ("fused", "lora"))])
@pytest.mark.parametrize("sizes", [dict(fsdp=2, tensor=4)], ids=str)
def test_it_is_the_same_as_one_device(how, sizes):
    """Packed rows, fewer key-value heads than devices of the tensor axis."""
    with jax.enable_x64(True):
        ours, one_device = (
            train(llama(num_key_value_heads=2), layout, dtype="float64", **HOW[how])
            for layout in (split(mesh_layout(**sizes)), None)
        )
        assert_trained_alike(ours, one_device, TOLERANCE)


@pytest.mark.optimized
def test_it_takes_less_memory():
    """Of each layer its input is kept, and each of four devices has a fourth of that."""
    wide = llama(vocab_size=64, hidden_size=256, num_hidden_layers=8)
    whole, parts = (
        program(wide, layout, shape=(64, 32), remat="full").compiled.temp_bytes
        for layout in (mesh_layout(tensor=4), split(mesh_layout(tensor=4)))
    )
    kept = 8 * 64 * 32 * 256 * 4
    assert whole - parts > 0.7 * kept


def test_a_length_that_does_not_divide_is_refused():
    with pytest.raises(
        UserError, match=r"rows of 10 tokens do not divide over the 4 devices of the mesh \(context 1 × tensor 4\)"
    ):
        program(llama(), split(mesh_layout(tensor=4)), shape=(8, 10))
