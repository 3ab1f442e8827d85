"""One device = every mesh over data, fsdp and tensor, accumulating or not."""

from functools import cache
from itertools import product

import jax
import numpy as np
import optax
import pytest

from jaxllm.core import tree
from tests.support.families import mesh_layout
from tests.support.optimizers import section
from tests.support.small_runs import MAX_GRAD_NORM, Trained, assert_trained_alike, llama, program, train
from tests.support.tiers import representatives

# "grouped": fewer key-value heads than tensor shards from tensor=4 on, so that every device holds them all.
MODELS = {
    "untied": dict(),
    "tied grouped": dict(tie_word_embeddings=True, num_key_value_heads=2),
    "tied": dict(tie_word_embeddings=True),
    "untied grouped": dict(num_key_value_heads=2),
}
# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10


@cache
def one_device(model: str) -> Trained:
    """The reference, run once a session."""
    return train(llama(**MODELS[model]), dtype="float64")


def check(model: str, sizes: dict[str, int], micro_batches: int) -> None:
    with jax.enable_x64(True):
        layout = mesh_layout(**sizes)
        ours = train(llama(**MODELS[model]), layout, micro_batches=micro_batches, dtype="float64")
        assert_trained_alike(ours, one_device(model), TOLERANCE)


def test_the_reference_run_is_worth_comparing():
    """It learns, clips in some steps and not in others, and its rate rises and falls."""
    with jax.enable_x64(True):
        metrics, state = one_device("untied")
    assert metrics["loss"][-4:].mean() < 0.8 * metrics["loss"][:4].mean()
    assert 3 <= (metrics["grad_norm"] > MAX_GRAD_NORM).sum() <= 17
    assert 0 < metrics["learning_rate"].argmax() < 19
    assert metrics["bad"].sum() == 0
    assert {leaf.dtype.name for path, leaf in state.items() if "count" not in path} == {"float64"}


# Each pair of axes, each model with and without accumulation, and all at once.
PAIRS = [
    ("untied", dict(data=2, fsdp=2), 1),
    ("tied grouped", dict(fsdp=2, tensor=4), 1),
    ("tied grouped", dict(data=2, tensor=2), 4),
    ("untied", dict(data=2, fsdp=2, tensor=2), 4),
]


@pytest.mark.parametrize(("model", "sizes", "micro_batches"), PAIRS, ids=str)
def test_pairs_of_axes(model, sizes, micro_batches):
    check(model, sizes, micro_batches)


SIZES = [(d, f, 8 // d // f) for d, f in product((1, 2, 4, 8), repeat=2) if d * f <= 8]


FACTORISED = [
    pytest.param(sizes, micro_batches, id="{}×{}×{} in {}".format(*sizes, micro_batches))
    for sizes in SIZES
    for micro_batches in (1, 4)
]
# Each size of each axis once, the models and both accumulations in turn.
CHOSEN = ["1×1×8 in 1", "1×8×1 in 4", "8×1×1 in 1", "1×2×4 in 4", "2×4×1 in 1", "4×1×2 in 4"]


@pytest.mark.full
@pytest.mark.parametrize(("sizes", "micro_batches"), representatives(FACTORISED, CHOSEN))
def test_every_factorisation_of_eight(sizes, micro_batches):
    """The models in turn: each meets both accumulations and most sizes of each axis."""
    model = list(MODELS)[(SIZES.index(sizes) + micro_batches // 4) % 4]
    check(model, dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)), micro_batches)


@pytest.mark.full
def test_parameters_on_the_axis_of_the_replicas():
    """A rule may split them over data too: then nothing is replicated there."""
    with jax.enable_x64(True):
        layout = mesh_layout(data=2, fsdp=2).replace(embed=("data", "fsdp"))
        ours = train(llama(**MODELS["untied"]), layout, micro_batches=4, dtype="float64")
        assert_trained_alike(ours, one_device("untied"), TOLERANCE)


@pytest.mark.optimized
def test_in_float32():
    """Loss within 1e-6, first gradients within 1e-5 of the leaf's largest value (DESIGN, section 5)."""
    how = dict(steps=1, tx=optax.trace(0.9), max_grad_norm=None)  # its state is the gradient
    ours, theirs = train(llama(), mesh_layout(data=2, fsdp=2, tensor=2), **how), train(llama(), **how)
    np.testing.assert_allclose(ours.metrics["loss"], theirs.metrics["loss"], rtol=1e-6)
    gradients = [
        Trained({}, {path: leaf for path, leaf in run.state.items() if "/trace/" in path}) for run in (ours, theirs)
    ]
    assert len(gradients[1].state) == 12
    assert_trained_alike(*gradients, 1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_galore_in_its_subspace(fused):
    """Its moments and projections have the shape of no parameter, and lie over fsdp and tensor all the same."""
    with jax.enable_x64(True):
        how = dict(optimizer=section("galore"), fused=fused, dtype="float64", steps=4, max_grad_norm=None)
        layout = mesh_layout(fsdp=2, tensor=2)
        assert_trained_alike(train(llama(), layout, **how), train(llama(), **how), TOLERANCE)
    how = dict(optimizer=section("galore"), fused=fused, max_grad_norm=None)
    state = program(llama(), layout, **how).start().opt_state
    moments = {path: leaf for path, leaf in tree.flatten(state).items() if "/mu/layers/mlp/" in path}
    # Of [L, 48, rank]: the 48 lie over tensor in every matrix of the feed-forward part, whichever side they are.
    assert {leaf.sharding.shard_shape(leaf.shape) for leaf in moments.values()} == {(2, 24, 3)}
