"""A run whose optimizer evaluates an average of what it trains."""

import jax
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from jaxllm.checkpoint.store import Checkpoint
from jaxllm.convert.__main__ import main as convert
from jaxllm.core import tree
from jaxllm.core.console import saying
from jaxllm.core.mesh import Layout
from jaxllm.hf import load_hf
from jaxllm.optim.build import build
from jaxllm.runs.open import open_model
from jaxllm.step.state import abstract_state
from jaxllm.train.inputs import evaluation_sets, read_inputs
from tests.support.optimizers import section
from tests.support.whole_runs import train, workplace

OVERRIDES = (
    "optim={type: schedule_free_adamw, learning_rate: 0.02, b1: 0.8}",
    *("train.steps=6", "checkpoint.every=3", "evals.0.every=6"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield train(config, *OVERRIDES)


def state_of(run, step: int):
    """The trained parameters and z of a checkpoint."""
    lm = open_model(run.folder, Layout.single()).lm
    tx, _ = build(section("schedule_free_adamw"), 6)
    shapes = abstract_state(lm.abstract(), jax.tree.map(lambda _: True, lm.abstract()), tx, lm.layout)
    state = Checkpoint(run.folder / "checkpoints", step).restore(shapes)
    return tree.flatten(state.params), tree.flatten(state.opt_state.z)


def averaged(y: dict, z: dict) -> dict[str, np.ndarray]:
    return {path: (np.asarray(y[path], float) - 0.2 * np.asarray(z[path], float)) / 0.8 for path in y}


def test_the_average_is_exported(run):
    y, z = state_of(run, 6)
    x = averaged(y, z)
    _, params = load_hf(run.folder / "export/hf")
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_allclose(leaf, x[path], rtol=1e-5, atol=1e-6, err_msg=path)
    # It is not what was trained.
    assert all(np.abs(x[path] - y[path]).max() > 1e-3 for path in x)


@pytest.mark.parametrize("name", ["", "checkpoints/3", "checkpoints/latest"])
def test_the_average_is_what_a_run_or_checkpoint_holds(run, name, tmp_path):
    x = averaged(*state_of(run, 3 if name.endswith("3") else 6))
    for path, leaf in tree.flatten(open_model(run.folder / name, Layout.single()).load()).items():
        np.testing.assert_allclose(leaf, x[path], rtol=1e-5, atol=1e-6, err_msg=path)
    if not name:
        assert convert(["to-hf", str(run.folder), str(tmp_path / "hf")]) == 0
        ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", run.folder / "export/hf"))
        for key, tensor in ours.items():
            np.testing.assert_array_equal(tensor, theirs[key])


def test_the_average_is_evaluated(run):
    """The loss that was logged is that of the export."""
    lm, params = load_hf(run.folder / "export/hf", layout=Layout.single())
    tokenizer = open_model(run.folder, Layout.single()).tokenizer()
    inputs = read_inputs(run.config, tokenizer, saying(Console(quiet=True)))
    accumulation = run.config.train.accumulation(lm.layout)
    held_out = evaluation_sets(run.config.evals, inputs.held_out, lm.layout, accumulation)[0]
    logged = [line["eval/held_out/loss"] for line in run.metrics() if "eval/held_out/loss" in line]
    total = tokens = 0.0
    for batch in held_out.batches():
        total += float(lm.losses(params, batch).cross_entropy)
        tokens += float(batch["loss_mask"].sum())
    assert logged[-1] == pytest.approx(total / tokens, rel=1e-5)
    assert logged[-1] < logged[0]
