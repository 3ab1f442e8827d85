"""Statistics that blocks return beside their output: an objective reads their sums over layers and the whole batch."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core import tree
from jaxllm.models import FAMILIES
from jaxllm.models.family import Output
from jaxllm.models.stack import loop
from jaxllm.objectives.base import CROSS_ENTROPY, Losses
from jaxllm.step.selection import Draws
from tests.support.families import mesh_layout
from tests.support.small_runs import Trained, assert_trained_alike, llama, program, ragged_batch, train

# Two programs that mean the same, in float64, of each leaf's largest value (DESIGN, section 5).
TOLERANCE = 1e-10
MODEL, STEPS = dict(num_hidden_layers=4), 6


class Routed(nn.Module):
    """A Llama's block that counts to which of four experts a router would send the tokens of a micro-batch."""

    config: Any
    dtype: Any

    @nn.compact
    def __call__(self, x, ctx, cache=None):
        block = FAMILIES["llama"].block(self.config, self.dtype)
        nn.share_scope(self, block)
        out = block(x, ctx, cache)
        mass = jax.nn.softmax(4 * out.x[..., :4])
        return Output(out.x, {"mass": jnp.sum(mass, (0, 1)), "tokens": jnp.float64(mass[..., 0].size)}, out.cache)


def balanced(scores: Any, batch: Any, aux: Any) -> Losses:
    """The cross entropy, and what is least where all experts have as much."""
    plain, tokens = CROSS_ENTROPY(scores, batch), jnp.sum(batch["loss_mask"])
    share = aux["mass"] / aux["tokens"]
    balance = tokens * jnp.sum(share**2)
    return Losses(plain.objective + balance, plain.cross_entropy, {"balance": balance})


HOW: dict[str, Any] = dict(steps=STEPS, dtype="float64", block=Routed, objective=balanced)


@cache
def reference(lisa: Draws | None) -> Trained:
    """One device, and one micro-batch."""
    return train(llama(**MODEL), lisa=lisa, **HOW)


LISA = Draws(2, 3, 1)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        ({}, dict(micro_batches=4)),
        pytest.param({}, dict(unroll=2, remat="dots", micro_batches=2), marks=pytest.mark.full),
        (dict(data=2, fsdp=2, tensor=2), dict(fused=True, micro_batches=4)),
        pytest.param(dict(data=2, fsdp=2, tensor=2), dict(micro_batches=2), marks=pytest.mark.full),
        pytest.param(dict(fsdp=2), dict(fused=True, remat="dots", micro_batches=2), marks=pytest.mark.full),
        (dict(fsdp=2), dict(lisa=LISA, micro_batches=4)),
        pytest.param(dict(data=2), dict(lisa=LISA, fused=True, micro_batches=2), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_accumulation_is_the_big_batch_on_any_mesh(sizes, how):
    with jax.enable_x64(True):
        ours = train(llama(**MODEL), mesh_layout(**sizes) if sizes else None, **HOW, **how)
        assert_trained_alike(ours, reference(how.get("lisa")), TOLERANCE)


def by_hand(micro_batches: int) -> dict[str, np.ndarray]:
    """The gradients where each micro-batch has its own balance."""
    made = program(llama(**MODEL), dtype="float64", block=Routed, objective=balanced)
    batch, params = made.place(ragged_batch(0), micro_batches), made.start().params

    def loss(params: Any) -> jax.Array:
        micro = [{name: a[i] for name, a in batch.items()} for i in range(micro_batches)]
        return sum(made.lm.losses(params, one, loop(), balanced).objective for one in micro) / batch["loss_mask"].sum()

    return {path: np.asarray(g) for path, g in tree.flatten(jax.jit(jax.grad(loss))(params)).items()}


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        (dict(pipeline=2, fsdp=2), {}),
        pytest.param(dict(pipeline=2), dict(virtual_stages=2, remat="full"), marks=pytest.mark.full),
        pytest.param(dict(pipeline=2, data=2), dict(fused=True), marks=pytest.mark.full),
        (dict(pipeline=2), dict(fused=True, virtual_stages=2)),
    ],
    ids=str,
)
def test_in_a_pipeline_each_micro_batch_is_balanced_by_itself(sizes, how):
    with jax.enable_x64(True):
        options: dict[str, Any] = {**HOW, "steps": 1, "tx": optax.sgd(1.0), "max_grad_norm": None}
        start = tree.flatten(program(llama(**MODEL), dtype="float64").start().params)
        ours = train(llama(**MODEL), mesh_layout(**sizes), micro_batches=4, **options, **how)
        for path, wanted in by_hand(4).items():
            own = tuple(slice(size) for size in wanted.shape)  # without what a mesh pads
            moved = np.asarray(start[path]) - ours.state[f"params/{path}"][own]
            np.testing.assert_allclose(moved, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max(), err_msg=path)


def test_an_evaluation_reads_them_on_stages_too():
    """The sums of a forward walk are those of the layers one after the other; what a bubble computes does not count."""
    with jax.enable_x64(True):
        sums = []
        for sizes, virtual in (({}, 1), (dict(pipeline=2), 1), (dict(pipeline=2), 2)):
            layout = mesh_layout(**sizes) if sizes else None
            how: dict[str, Any] = dict(HOW, virtual_stages=virtual, micro_batches=2)
            del how["steps"]
            made = program(llama(**MODEL), layout, **how)
            batch = {name: a[0] for name, a in made.place(ragged_batch(0)).items()}

            def balance(params: Any, batch: Any, lm: Any = made.lm) -> jax.Array:
                return lm.losses(params, batch, objective=balanced).parts["balance"]

            sums.append(float(jax.jit(balance)(made.start().params, batch)))
        np.testing.assert_allclose(sums[1:], sums[0], rtol=TOLERANCE)
