"""An objective of one's own: a function of the scores of tokens, in every kind of step."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.objectives.base import Losses, TokenScores, cross_entropy
from tests.support.families import draw_params, mesh_layout, small_lm
from tests.support.small_runs import assert_trained_alike, llama, ragged_batch, train


def focal(scores: TokenScores, batch: Mapping[str, jax.Array], aux: object) -> Losses:
    """Σ (1 − p)² · −log p (Lin et al., arXiv 1708.02002, equation 4), and the entropy-like Σ (log Z − mean z)."""
    del aux
    mask = batch["loss_mask"].astype(scores.logprob.dtype)
    assert scores.mean_logit is not None
    spread = 1e-3 * jnp.sum((scores.log_z - scores.mean_logit) * mask)
    total = jnp.sum((1 - jnp.exp(scores.logprob)) ** 2 * -scores.logprob * mask) + spread
    return Losses(total, cross_entropy(scores, batch), {"spread": spread})


def test_it_is_differentiated_as_written():
    lm = small_lm(llama(), dtype="float64")
    with jax.enable_x64(True):
        params, batch = draw_params(lm), ragged_batch(0, rows=8)

        def by_hand(params):
            z = lm.logits(params, batch["tokens"], positions=batch["positions"], segments=batch["segments"])
            log_p = jax.nn.log_softmax(z)
            of_target = jnp.take_along_axis(log_p, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
            focused = (1 - jnp.exp(of_target)) ** 2 * -of_target
            return jnp.sum((focused - 1e-3 * log_p.mean(-1)) * batch["loss_mask"])

        def ours(params):
            return lm.losses(params, batch, objective=focal).objective

        wanted, found = (jax.jit(jax.value_and_grad(f))(params) for f in (by_hand, ours))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


@pytest.mark.full
def test_every_kind_of_step_minimises_it():
    """Fused on a mesh, and in the stages of a pipeline, as one device does; its parts are metrics."""
    with jax.enable_x64(True):
        run = partial(train, llama(), objective=focal, dtype="float64", steps=4)
        one_device = run()
        assert_trained_alike(run(mesh_layout(fsdp=2, tensor=2), micro_batches=2, fused=True), one_device, 1e-10)
        pipelined = run(mesh_layout(pipeline=2, data=2), micro_batches=4)
        assert_trained_alike(pipelined, one_device, 1e-10)
    metrics = one_device.metrics
    assert (metrics["objective"] != metrics["loss"]).all()
    np.testing.assert_allclose(pipelined.metrics["spread"], metrics["spread"], rtol=1e-12)
