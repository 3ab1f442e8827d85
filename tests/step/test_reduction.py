"""How gradients are summed over devices: in parts (`train.shard_optimizer`), in bfloat16."""

import jax
import optax
import pytest

from jaxllm.core.errors import UserError
from jaxllm.optim.build import build
from jaxllm.plan.plan import bytes_on_a_device
from jaxllm.runs.config import Config
from jaxllm.step.state import abstract_state
from tests.support.families import mesh_layout, small_lm
from tests.support.small_runs import OPTIMIZER, STEPS, assert_trained_alike, llama, misses, train

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10
LAYERS = dict(num_hidden_layers=4)


@pytest.mark.parametrize(
    ("sizes", "micro_batches"),
    [
        (dict(pipeline=2, data=2), 4),
        pytest.param(dict(data=2, fsdp=2, tensor=2), 1, marks=pytest.mark.full),
        pytest.param(dict(data=4, fsdp=2), 2, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_it_is_the_same_as_one_device(sizes, micro_batches):
    with jax.enable_x64(True):
        how = dict(dtype="float64")
        ours = train(llama(**LAYERS), mesh_layout(**sizes), micro_batches=micro_batches, scattered=True, **how)
        assert_trained_alike(ours, train(llama(**LAYERS), **how), TOLERANCE)


@pytest.mark.parametrize("sizes", [dict(pipeline=2, data=2, tensor=2), dict(data=4, fsdp=2)], ids=str)
def test_each_replica_has_a_part(sizes):
    """Moments take a part of the bytes, parameters as many as before."""
    lm = small_lm(llama(**LAYERS), mesh_layout(**sizes))
    params, tx = lm.abstract(), build(OPTIMIZER, STEPS, lm.padded)[0]
    everything = jax.tree.map(lambda _: True, params)
    whole, part = (
        abstract_state(params, everything, tx, lm.layout, scattered=scattered) for scattered in (False, True)
    )
    assert bytes_on_a_device(part.params) == bytes_on_a_device(whole.params)
    counters = 4 * len([leaf for leaf in jax.tree.leaves(whole.opt_state) if leaf.ndim == 0])
    of_moments = bytes_on_a_device(whole.opt_state) - counters
    assert bytes_on_a_device(part.opt_state) - counters == pytest.approx(of_moments / sizes["data"], rel=0.01)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradients_summed_in_bfloat16(micro_batches):
    """They are off by its rounding: of each replica's part, and of the sum."""
    layout, how = mesh_layout(data=4, fsdp=2), dict(steps=1, tx=optax.trace(0.9), max_grad_norm=None)
    ours = train(llama(), layout, micro_batches=micro_batches, reduce_dtype="bfloat16", **how)
    exact, rounded = misses(ours, train(llama(), **how))
    gradients = [miss for path, miss in rounded.items() if "/trace/" in path]
    assert exact["loss"] < 1e-6
    assert all(2**-12 < miss < 2**-6 for miss in gradients)


def test_late_sums_are_gone():
    """A config that an older version resolved says `each`, and is read; what `late` did is not done in silence."""
    assert not hasattr(Config.model_validate(sections(reduce="each")).train, "reduce")
    with pytest.raises(
        (ValueError, UserError), match=r"train\.reduce is late, which this version .*; remove reduce, and"
    ):
        Config.model_validate(sections(reduce="late"))


def sections(**train):
    return {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"sources": [{"path": "text.jsonl"}], "seq_len": 128},
        "optim": {"type": "adalomo", "learning_rate": 1e-3},
        "train": {"steps": 10, "batch_size": 32, **train},
    }
