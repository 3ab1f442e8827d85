"""Optimizers that need whole matrices: updating one layer after the other equals updating all layers at once."""

from typing import Any

import jax
import pytest

from jaxllm.optim.build import OPTIMIZERS
from tests.support.families import mesh_layout
from tests.support.optimizers import section
from tests.support.small_runs import assert_trained_alike, llama, train

MATRIX_OPTIMIZERS = [name for name in OPTIMIZERS if OPTIMIZERS[name].needs_whole_matrices]
STAGES = (dict(pipeline=2, data=2, fsdp=2), dict(micro_batches=2, scattered=True))
REPLICAS = (dict(data=2, fsdp=2, tensor=2), dict(scattered=True))


@pytest.mark.parametrize(
    ("name", "sizes", "how"),
    [
        ("muon", *STAGES),
        pytest.param("muon", *REPLICAS, marks=pytest.mark.full),
        pytest.param("galore", *STAGES, marks=pytest.mark.full),
        pytest.param("galore", *REPLICAS, marks=pytest.mark.full),
        pytest.param("muon", {}, dict(max_grad_norm=None, max_grad_value=1e-2), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_it_is_the_update_of_all_layers(name: str, sizes: dict[str, int], how: dict[str, Any]) -> None:
    """In float64, of stages that hold different layers, and of replicas that hold parts of the state."""
    assert name in MATRIX_OPTIMIZERS
    model, common = llama(num_hidden_layers=4), dict(optimizer=section(name), dtype="float64", steps=6)
    clip = {key: value for key, value in how.items() if key.startswith("max")}
    with jax.enable_x64(True):
        layout = mesh_layout(**sizes) if sizes else None
        ours = train(model, layout, **common, **how)
        assert_trained_alike(ours, train(model, by_layer=False, **common, **clip), 1e-10)
