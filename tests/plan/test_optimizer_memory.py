"""Every optimizer on `fsdp: 8`: all that it keeps is divided, and two layers at most are whole besides."""

from pathlib import Path

import pytest

from jaxllm.optim.build import OPTIMIZERS
from tests.support.gpu_plans import config_of, gpu_plans, needs_compiler

LAYERS, WIDTH, HIDDEN = 64, 1024, 2816
MODEL = dict(vocab_size=2048, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS)
# One whole layer in float32. A device's part of a float32 copy of all layers is eight of them.
LAYER = 4 * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)
# Those whose update is no function of single entries of the gradient and the state.
OTHERS = ("muon", "galore", "prodigy", "sophia_g")
ENTRYWISE = [name for name in OPTIMIZERS if name not in OTHERS]


def assert_divided(folder: Path, *names: str) -> None:
    """`names` against SGD, whose step has the same temporaries except for the update's."""
    how = dict(update="ordinary", remat="full", batch_size=8)
    config = config_of(folder, MODEL | dict(num_attention_heads=8), **how)
    common = ["mesh.fsdp=8", "data.seq_len=128"]
    sgd, *plans = gpu_plans(config, *([*common, f"optim.type={name}"] for name in ("sgd", *names)))
    for name, one in zip(names, plans, strict=True):
        # Sophia has a second gradient, of the curvature.
        gradients = one.parts["parameters"] if name == "sophia_g" else 0
        assert one.temp <= sgd.temp + gradients + 2 * LAYER, (name, (one.temp - sgd.temp - gradients) / LAYER)


@needs_compiler
def test_whole_matrices_and_sums_over_the_model(tmp_path: Path) -> None:
    assert_divided(tmp_path, *OTHERS)


@pytest.mark.full
@needs_compiler
def test_entry_by_entry(tmp_path: Path) -> None:
    assert_divided(tmp_path, *ENTRYWISE)
