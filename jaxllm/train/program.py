"""The program of a run: what each step computes and what it carries, known before any data or weight is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxllm.core import tree
from jaxllm.core.host_memory import to_device
from jaxllm.core.layer_order import rearranged
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.objectives.base import CrossEntropy
from jaxllm.optim.build import at_rate, build
from jaxllm.optim.wrappers import scale_updates
from jaxllm.runs.config import Config
from jaxllm.runs.train_config import Accumulation
from jaxllm.step.batch import batch_shapes
from jaxllm.step.build import build_step
from jaxllm.step.compile import CompiledStep, compile_steps
from jaxllm.step.layer_states import LayerStates
from jaxllm.step.selection import Draws
from jaxllm.step.state import TrainState, abstract_state, new_state
from jaxllm.step.xla_options import Options, compiler_options


@dataclass(frozen=True)
class Program:
    """The training step of `config` for `lm`, and the shapes, dtypes and shardings of the state that it carries.

    It holds no arrays, and its devices need not be there.
    """

    config: Config
    lm: LM
    tx: optax.GradientTransformationExtraArgs | LayerStates
    schedule: optax.Schedule
    draws: Draws | None
    trainable: Any
    state: TrainState

    @staticmethod
    def of(config: Config, lm: LM, steps: int) -> "Program":
        """The program of a run of `steps` steps of `lm`, an `adapted` model. Raises UserError for a schedule that does
        not fit them."""
        tx, schedule = build(config.optim, steps, lm.padded)
        tx = config.peft.transform(scale_updates(tx, config.peft.rates()), lm, steps)
        draws = None
        if chosen := config.peft.draws:
            draws = Draws(chosen.active_layers, chosen.interval, config.seed, chosen.state)
            rates = config.peft.rates()
            tx = LayerStates(lambda rate: scale_updates(at_rate(config.optim, rate, lm.padded), rates), schedule, draws)
        params, trainable = lm.abstract(), config.peft.mask(lm)
        train = config.train
        whole_layers = train.update == "fused" or draws is not None
        how = dict(scattered=train.shard_optimizer, whole_layers=whole_layers, offloaded=train.offload_optimizer)
        state = abstract_state(params, trainable, tx, lm.layout, scale_loss=train.scales_loss(), **how)
        return Program(config, lm, tx, schedule, draws, trainable, state)

    def batch(self, accumulation: Accumulation, width: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a batch whose rows have `width` places, abstractly."""
        return batch_shapes((accumulation.micro_batches, accumulation.rows, width), self.lm.layout)

    def compiler_options(self, autotuned: Path | None = None) -> Options:
        """XLA's options for the step. autotuned: the folder that keeps the kernels of a deterministic run."""
        train = self.config.train
        return compiler_options(
            self.lm, update=train.update, xla=train.xla, deterministic=train.deterministic, autotuned=autotuned
        )

    def compile(
        self, accumulation: Accumulation, widths: Sequence[int], options: Mapping[str, Any] | None = None
    ) -> CompiledStep:
        """The compiled step for batches cut by `accumulation`, of rows of any of `widths`. options: the compiler's."""
        config, train = self.config, self.config.train
        step = build_step(
            self.lm,
            self.tx,
            self.schedule,
            draws=self.draws,
            update=train.update,
            remat=train.remat,
            unroll=train.unroll,
            reduce_dtype=train.reduce_dtype,
            shard_optimizer=train.shard_optimizer,
            objective=CrossEntropy(train.label_smoothing, train.z_loss),
            max_grad_norm=train.max_grad_norm,
            max_grad_value=train.max_grad_value,
            stochastic_rounding=train.stochastic_rounding,
            seed=config.seed,
            curvature=config.optim.curvature(),
            penalty=config.peft.penalty(self.lm),
            by_layer=config.optim.needs_whole_matrices and not config.peft.compares_layers,
        )
        return compile_steps(
            step, self.state, [self.batch(accumulation, width) for width in widths], self.lm.layout, options
        )

    def weights(self, state: TrainState) -> Params:
        """The parameters to evaluate and export: those that train, or what the optimizer makes of them."""
        if averages := self.config.optim.averages:
            return tree.combine(self._evaluated(state.params, getattr(state.opt_state, averages)), state.frozen)
        return tree.combine(state.params, state.frozen)

    @cached_property
    def _evaluated(self) -> Any:
        def evaluated(params: Params, averaged: Params) -> Params:
            return self.config.optim.evaluation_params(params, jax.tree.map(to_device, averaged))

        return jax.jit(evaluated)

    def start(self, params: Params) -> TrainState:
        """The state before the first step, with what the method of fine-tuning adds. The buffers of `params` are
        reused."""

        def first(params: Params) -> TrainState:
            params = self.lm.with_extra(params, jax.random.key(self.config.seed))
            return new_state(params, self.trainable, self.tx, scale_loss=self.config.train.scales_loss())

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return self.arranged(jax.jit(first, out_shardings=shardings, donate_argnums=0)(params))

    def arranged(self, state: TrainState) -> TrainState:
        """A state whose layers are one behind the other, in the order in which the stages have them. Its buffers are
        given up."""
        return rearranged(state, self.lm.layer_order)

    def exported(self, state: TrainState) -> Params:
        """`weights`, of layers that are one behind the other. The buffers of `state` are given up."""
        return rearranged(self.weights(state), np.argsort(self.lm.layer_order))
