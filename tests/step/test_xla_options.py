"""XLA's options for the step: those for the mesh, which XLA knows, those of the config, and the same bits each time."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.checkpoint.run_files import AUTOTUNED
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.runs.train_config import TrainConfig
from jaxllm.step import xla_options
from jaxllm.step.compile import compile_step
from jaxllm.step.xla_options import compiler_options, describe_options, deterministic_options
from tests.support.families import mesh_layout, small_lm
from tests.support.small_runs import llama, program
from tests.support.whole_runs import train, workplace

OnGpus = Callable[..., dict[str, Any]]


@pytest.fixture
def on_gpus(monkeypatch: pytest.MonkeyPatch) -> OnGpus:
    """The options for a small model that computes in bfloat16 on a mesh of devices that say that they are GPUs."""

    def options(mesh: dict[str, int], **settings: Any) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "platform", "gpu")
            lm = replace(small_lm(llama(), mesh_layout(**mesh)), compute_dtype=jnp.dtype("bfloat16"))
            train = TrainConfig(steps=1, batch_size=8, **settings)
            return compiler_options(lm, update=train.update, xla=train.xla, deterministic=train.deterministic)

    return options


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield config


ALL_AT_ONCE = dict(pipeline=2, data=2, tensor=2)


def test_xla_knows_every_option_of_a_gpu(on_gpus, tmp_path):
    """It refuses a name that it does not know, on any platform."""
    options = on_gpus(ALL_AT_ONCE) | deterministic_options(tmp_path / AUTOTUNED, "gpu")
    assert options["xla_gpu_per_fusion_autotune_cache_dir"] == str(tmp_path / AUTOTUNED)
    double = jax.jit(lambda x: 2 * x).lower(jnp.ones(3))
    assert (double.compile(compiler_options=options)(jnp.ones(3)) == 2).all()
    for name, value in options.items():
        with pytest.raises(jax.errors.JaxRuntimeError, match=name):
            double.compile(compiler_options={f"{name}s": value})


def test_what_suits_a_mesh(on_gpus):
    """Nothing on a CPU; on one GPU no pass that computes again; on several, transfers of a layer at a time."""
    assert compiler_options(small_lm(llama(), mesh_layout(fsdp=4)), update="ordinary", xla={}) == {}
    alone = on_gpus({})
    assert alone == {"xla_disable_hlo_passes": "rematerialization"}
    sharded = on_gpus(dict(fsdp=4))
    # Two bytes of each matrix and norm of a layer: width 32, 8 heads of 4, three matrices of 32 × 48.
    layer = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    assert {value for name, value in sharded.items() if name.endswith("threshold_bytes")} == {layer}
    assert sharded["xla_gpu_enable_latency_hiding_scheduler"] is True
    pipelined = {name for name in sharded if "pipelined" in name}
    assert pipelined == {f"xla_gpu_enable_pipelined_{kind}" for kind in ("all_gather", "reduce_scatter", "all_reduce")}
    # Which take memory; a fused update is there to save that.
    assert on_gpus(dict(fsdp=4), update="fused") == {n: value for n, value in sharded.items() if n not in pipelined}
    halves = on_gpus(dict(tensor=2))
    assert halves["xla_gpu_all_gather_combine_threshold_bytes"] == layer // 2
    assert on_gpus(ALL_AT_ONCE).keys() == halves.keys()


def test_what_the_environment_and_the_config_say_goes_first(on_gpus, monkeypatch):
    name, other = "xla_gpu_enable_latency_hiding_scheduler", "xla_gpu_enable_pipelined_all_gather"
    chosen = on_gpus(dict(fsdp=4))
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=false --xla_dump_to=dump")
    assert on_gpus(dict(fsdp=4)) == {key: value for key, value in chosen.items() if key != name}
    assert on_gpus(dict(fsdp=4), xla={name: True, other: False}) == {**chosen, other: False}


def test_what_this_xla_does_not_know_is_not_chosen(on_gpus, monkeypatch):
    """Flags come and go with XLA's versions."""
    known = xla_options.suiting_options
    monkeypatch.setattr(xla_options, "suiting_options", lambda *of: {**known(*of), "xla_gpu_enable_magic": True})
    options = on_gpus(dict(fsdp=4))
    assert "xla_gpu_enable_latency_hiding_scheduler" in options
    assert "xla_gpu_enable_magic" not in options


@pytest.mark.parametrize(
    ("xla", "message"),
    [
        (
            {"xla_gpu_enable_magic": True},
            r"xla\.xla_gpu_enable_magic: True is not taken by .*No such compile option",
        ),
        ({"xla_gpu_enable_latency_hiding_scheduler": "perhaps"}, r"hiding_scheduler: 'perhaps' is not taken by"),
        ({"--xla_gpu_enable_magic": True}, "'--xla_gpu_enable_magic' is no flag of XLA; write one as in XLA_FLAGS"),
    ],
    ids=str,
)
def test_options_that_there_are_not_are_refused(on_gpus, xla, message):
    with pytest.raises((UserError, ValueError), match=message):
        on_gpus({}, xla=xla)


def test_options_read_as_in_the_environment():
    assert describe_options({"xla_a": True, "xla_b": 3, "xla_c": "x"}) == "xla_a=true xla_b=3 xla_c=x"


def test_a_run_takes_the_options_of_its_config(config):
    """And says so."""
    overrides = ("train.steps=2", "evals=[]", "data.eval_fraction=0", "checkpoint.every=null")
    ran = train(config, *overrides, "train.xla={xla_cpu_multi_thread_eigen: false}", f"output_dir={config.parent}/xla")
    assert "xla       xla_cpu_multi_thread_eigen=false" in ran.said
    assert np.isfinite(ran.metrics()[1]["train/loss"])


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
