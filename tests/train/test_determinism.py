"""`train.deterministic`: options for one program, which XLA knows; the same bits, where they are not free."""

import jax
import jax.numpy as jnp
import pytest
from small_runs import llama, program
from whole_runs import train, workplace

from jaxllm.train.determinism import AUTOTUNED, describe_options, deterministic_options
from jaxllm.train.step import compile_step


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield config


def test_xla_knows_every_option_of_a_gpu(tmp_path):
    """It refuses a name or a value that it does not know, on any platform."""
    options = deterministic_options(tmp_path, "gpu")
    assert options["xla_gpu_per_fusion_autotune_cache_dir"] == str(tmp_path / AUTOTUNED)
    assert str(tmp_path) in describe_options(options)
    double = jax.jit(lambda x: 2 * x).lower(jnp.ones(3))
    assert (double.compile(compiler_options=options)(jnp.ones(3)) == 2).all()
    for name, value in options.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=name):
            double.compile(compiler_options={f"{name}s": value})


def test_the_options_are_those_of_the_step(tmp_path):
    def step(state, batch):
        return state, {}

    layout = program(llama()).layout
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_exclude_everything"):
        compile_step(step, {}, {}, layout, {"xla_gpu_exclude_everything": True})


def test_on_a_cpu_nothing_changes_and_the_run_says_so(config):
    overrides = ("train.steps=2", "evals=[]", "data.eval_fraction=0")
    plain, same = (
        train(config, *overrides, f"train.deterministic={value}", f"output_dir={config.parent / value}")
        for value in ("false", "true")
    )
    assert "changes nothing here" in same.said
    assert "changes nothing here" not in plain.said
    assert not (same.folder / AUTOTUNED).exists()
    exports = [(ran.folder / "export/hf/model.safetensors").read_bytes() for ran in (plain, same)]
    assert exports[0] == exports[1]
