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
from jaxllm.step.deferred_reduction import accumulated_late
from jaxllm.step.fused_lisa import make_fused_lisa_step
from jaxllm.step.gradient import Gradient, accumulated
from jaxllm.step.layerwise_step import make_fused_step
from jaxllm.step.pipeline_1f1b import pipelined
from jaxllm.step.reduction import reduced_once
from jaxllm.step.sampled_layers import LisaOptimizer, make_lisa_step
from jaxllm.step.state import Step
from jaxllm.step.update import make_step

# Layers that the program of a CPU may hold one after the other: the time to compile grows with each of them.
MOST_UNROLLED = 64


def build_step(
    lm: LM,
    tx: optax.GradientTransformationExtraArgs | LisaOptimizer,
    schedule: optax.Schedule,
    *,
    update: Literal["ordinary", "fused"] = "ordinary",
    remat: RematConfig = "none",
    unroll: int | Literal["auto", "all"] = "auto",
    reduce: Literal["each", "late"] = "each",
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

    update, remat, unroll, reduce, reduce_dtype, shard_optimizer, max_grad_norm, max_grad_value, stochastic_rounding:
    as in the section `train` of a config. seed: of what the step draws. curvature, penalty, by_layer: of the ordinary
    step, see `make_step`.
    """
    limits = {"max_grad_norm": max_grad_norm, "max_grad_value": max_grad_value}
    options = {**limits, "objective": objective, "stochastic_rounding": stochastic_rounding, "seed": seed}
    if isinstance(tx, LisaOptimizer):
        make = make_fused_lisa_step if update == "fused" else make_lisa_step
        return make(tx, schedule, **options)
    if update == "fused":
        return make_fused_step(lm, tx, schedule, **options)
    gradient = _gradient(lm, remat, unroll, reduce, reduce_dtype)
    gradient = reduced_once(gradient, scattered=shard_optimizer, dtype=reduce_dtype)
    how = {"curvature": curvature, "penalty": penalty, "by_layer": by_layer, "scattered": shard_optimizer}
    return make_step(lm, tx, schedule, gradient=gradient, **how, **options)


def _gradient(
    lm: LM,
    remat: RematConfig,
    unroll: int | Literal["auto", "all"],
    reduce: Literal["each", "late"],
    reduce_dtype: str | None,
) -> Gradient:
    if lm.layout.stages > 1:
        return pipelined("stages" if remat == "full" else "layers")
    stack = _stack(lm, remat, unroll)
    return accumulated_late(stack, reduce_dtype) if reduce == "late" else accumulated(stack)


def _stack(lm: LM, remat: RematConfig, unroll: int | Literal["auto", "all"]) -> Stack:
    few = lm.config.num_hidden_layers <= MOST_UNROLLED
    automatic = "all" if lm.layout.platform == "cpu" and few else 1
    return scan(remat, automatic if unroll == "auto" else unroll)
