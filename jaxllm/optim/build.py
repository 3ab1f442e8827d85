"""The optimizers of the `optim:` section of a config, and what is built from one."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import optax
from pydantic import PositiveInt

from jaxllm import optim
from jaxllm.core import tree
from jaxllm.core.registry import Registry
from jaxllm.optim import wrapped
from jaxllm.optim.config import Decay, DecayMask, OptimizerConfig, Positive
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.schedule_config import NotNegative
from jaxllm.optim.wrappers import per_layer, without_padding


class AdamW(OptimizerConfig):
    type: Literal["adamw"]
    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        return optim.adamw(rate, self.b1, self.b2, self.eps, self.weight_decay, mask=mask)


class Lion(OptimizerConfig):
    type: Literal["lion"]
    b1: Decay = 0.9
    b2: Decay = 0.99

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        return optim.lion(rate, self.b1, self.b2, self.weight_decay, mask=mask)


class Adan(OptimizerConfig):
    type: Literal["adan"]
    b1: Decay = 0.98
    b2: Decay = 0.92
    b3: Decay = 0.99
    eps: Positive = 1e-8
    no_prox: bool = False
    """Weight decay as in AdamW instead of the proximal step."""

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        return optim.adan(rate, self.b1, self.b2, self.b3, self.eps, self.weight_decay, self.no_prox, mask=mask)


class Lomo(OptimizerConfig):
    type: Literal["lomo"]

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        return optim.lomo(rate, self.weight_decay, mask=mask)


class AdaLomo(OptimizerConfig):
    type: Literal["adalomo"]
    has_statistics: ClassVar[bool] = True
    decay_rate: Positive = 0.8
    """How fast the memory of the second moment grows."""
    eps: tuple[Positive, Positive] = (1e-30, 1e-3)
    """Added to the squared gradient; the least scale of a parameter."""
    clip_threshold: Positive = 1.0
    """The largest RMS of a tensor's update, before the rate and the parameter's scale."""

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        return optim.adalomo(rate, self.decay_rate, self.eps, self.clip_threshold, self.weight_decay, mask=mask)


class SophiaG(OptimizerConfig):
    type: Literal["sophia_g"]
    needs_whole_model: ClassVar[str] = "takes a second gradient of the whole model"
    weight_decay: NotNegative = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    b1: Decay = 0.965
    b2: Decay = 0.99
    rho: Positive = 0.04
    """Larger scales more entries and clips fewer: raise it while train/sophia_win_rate is below 0.1, lower it above
    0.5."""
    hessian_every: PositiveInt = 10
    """Updates between estimates of the curvature, each of which costs a second gradient."""

    def curvature(self) -> Curvature:
        return Curvature(self.hessian_every, self.rho)

    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        return optim.sophia_g(rate, self.b1, self.b2, self.rho, self.weight_decay, mask=mask)


OPTIMIZERS = Registry[type[OptimizerConfig]]("optimizer")
OPTIMIZERS.add("adamw", AdamW)
OPTIMIZERS.add("lion", Lion)
OPTIMIZERS.add("adan", Adan)
OPTIMIZERS.add("lomo", Lomo)
OPTIMIZERS.add("adalomo", AdaLomo)
OPTIMIZERS.add("sophia_g", SophiaG)
OPTIMIZERS.add("sgd", wrapped.Sgd)
OPTIMIZERS.add("nadamw", wrapped.NAdamW)
OPTIMIZERS.add("radam", wrapped.RAdam)
OPTIMIZERS.add("ademamix", wrapped.AdEMAMix)
OPTIMIZERS.add("adagrad", wrapped.Adagrad)
OPTIMIZERS.add("rmsprop", wrapped.RmsProp)
OPTIMIZERS.add("adafactor", wrapped.Adafactor)
OPTIMIZERS.add("schedule_free_sgd", wrapped.ScheduleFreeSgd)
OPTIMIZERS.add("schedule_free_adamw", wrapped.ScheduleFreeAdamW)
OPTIMIZERS.add("prodigy", wrapped.Prodigy)
OPTIMIZERS.add("muon", wrapped.Muon)
OPTIMIZERS.add("galore", wrapped.GaLore)


def build(
    config: OptimizerConfig, total_steps: int, padded: Mapping[str, tuple[int, int]] | None = None
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The transform and its learning-rate schedule (for logging) for a run of `total_steps` steps.

    padded: the parameters that are larger in memory than they are (`LM.padded`). The transform does not clip by the
    global norm: the step does, before it. Raises UserError for a warm-up longer than the run.
    """
    rate = config.schedule.build(config.learning_rate, total_steps)
    return at_rate(config, rate, padded), rate


def at_rate(
    config: OptimizerConfig, rate: optax.Schedule, padded: Mapping[str, tuple[int, int]] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The transform of `build` with `rate` for its schedule."""

    def decays(params: optax.Params) -> Any:
        return tree.match(params, "*", exclude=config.no_decay, allow_unmatched=True)

    tx = config.transform(rate, decays)
    if config.has_statistics:
        tx = without_padding(per_layer(tx), padded or {})
    return tx
