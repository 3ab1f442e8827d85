"""The training step that settings describe."""

from collections.abc import Callable
from typing import Literal

import jax
import optax

from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.models.stack import RematConfig, Stack, scan
from jaxllm.objectives.base import CROSS_ENTROPY, Objective
from jaxllm.optim.curvature import Curvature
from jaxllm.step.at_once import AtOnce
from jaxllm.step.backward import Backward
from jaxllm.step.gradient import Gradient, accumulated, penalised
from jaxllm.step.layer_by_layer import LayerByLayer, sampled
from jaxllm.step.layer_states import LayerStates
from jaxllm.step.layerwise import How
from jaxllm.step.pipeline_1f1b import pipelined
from jaxllm.step.reduction import reduced_once
from jaxllm.step.selection import EVERYTHING, Draws, SampledLayers
from jaxllm.step.state import Step
from jaxllm.step.update import make_step

# Layers that the program of a CPU may hold one after the other: the time to compile grows with each of them.
MOST_UNROLLED = 64

Unroll = int | Literal["auto", "all"]


def build_step(
    lm: LM,
    tx: optax.GradientTransformationExtraArgs | LayerStates,
    schedule: optax.Schedule,
    *,
    draws: Draws | None = None,
    update: Literal["ordinary", "fused"] = "ordinary",
    remat: RematConfig = "none",
    unroll: Unroll = "auto",
    reduce_dtype: str | None = None,
    shard_optimizer: bool = False,
    objective: Objective = CROSS_ENTROPY,
    max_grad_norm: float | None = None,
    max_grad_value: float | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
    curvature: Curvature | None = None,
    penalty: Callable[[Params], jax.Array] | None = None,
    by_layer: bool = False,
) -> Step:
    """The training step of `lm` under `tx`.

    draws: which layers train when, if not all do; `tx` then has a state for each. update, remat, unroll, reduce_dtype,
    shard_optimizer, max_grad_norm, max_grad_value, stochastic_rounding: as in the section `train` of a
    config. seed: of what the step draws. curvature, penalty, by_layer: of the ordinary step, see `AtOnce` and
    `penalised`.
    """
    how = How(remat, _forward_unroll(unroll), reduce_dtype, shard_optimizer)

    def at_once() -> Backward:
        plain = _gradient(lm, how, draws, unroll)
        gradient = plain if penalty is None else penalised(plain, penalty)
        one_by_one = by_layer and draws is None  # of sampled layers it is few matrices anyway
        return AtOnce(gradient, plain, curvature, one_by_one, shard_optimizer, seed, max_grad_norm)

    return make_step(
        lm,
        tx,
        schedule,
        backward=LayerByLayer(how) if update == "fused" else at_once(),
        selection=EVERYTHING if draws is None else SampledLayers(lm, draws),
        objective=objective,
        max_grad_norm=max_grad_norm,
        max_grad_value=max_grad_value,
        seed=seed,
        stochastic_rounding=stochastic_rounding,
    )


def _gradient(lm: LM, how: How, draws: Draws | None, unroll: Unroll) -> Gradient:
    if lm.layout.stages > 1:
        gradient = pipelined("stages" if how.remat == "full" else "layers")
    elif draws is not None:
        return sampled(how)  # it sums over the replicas itself, one layer after the other
    else:
        gradient = accumulated(_stack(lm, how.remat, unroll))
    return reduced_once(gradient, scattered=how.scattered, dtype=how.dtype)


def _stack(lm: LM, remat: RematConfig, unroll: Unroll) -> Stack:
    few = lm.config.num_hidden_layers <= MOST_UNROLLED
    automatic = "all" if lm.layout.platform == "cpu" and few else 1
    return scan(remat, automatic if unroll == "auto" else unroll)


def _forward_unroll(unroll: Unroll) -> int | bool:
    """How many layers a walk that keeps their inputs does at once."""
    return 1 if unroll == "auto" else True if unroll == "all" else unroll
