"""The `optim:` section of a config: which optimizer, with which schedule, and which parameters decay."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
import optax
from pydantic import BeforeValidator, Field, PositiveInt

from jaxllm import optim
from jaxllm.core import tree
from jaxllm.core.config import ByType, Section
from jaxllm.core.errors import UserError
from jaxllm.core.registry import Registry
from jaxllm.optim import schedule
from jaxllm.optim.wrappers import per_layer, without_padding


def _steps_or_share(value: Any) -> Any:
    is_steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    is_share = isinstance(value, float) and 0 <= value < 1
    if not (is_steps or is_share):
        raise ValueError(
            f"must be a number of steps (100), or a share of the run of at least 0.0 and below 1.0 (0.03), "
            f"got {value!r}"
        )
    return value


StepsOrShare = Annotated[int | float, BeforeValidator(_steps_or_share)]
"""A part of a run: an integer is a number of steps, a fraction is a share of all of them."""

Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
DecayMask = Callable[[optax.Params], Any]


def _in_steps(length: int | float, total_steps: int) -> int:
    return length if isinstance(length, int) else round(length * total_steps)


class ScheduleConfig(Section):
    """How the learning rate moves over the run; see `optim.schedule` for the exact values."""

    type: Any
    """The name of the schedule, as each section narrows it."""
    warmup: StepsOrShare = 0.03
    """Steps (a whole number), or share of the schedule (below 1), in which the rate rises to its peak."""
    steps: PositiveInt | None = None
    """How long the schedule is; default: as the run. A shorter run is a part of it, and after it the rate stays."""

    def build(self, peak: float, total_steps: int) -> optax.Schedule:
        """The schedule of a run of `total_steps`.

        Raises UserError for a warm-up longer than the run, a decay that does not fit, or a schedule that ends at 0
        before the run does.
        """
        length = self.steps or total_steps
        warmup = _in_steps(self.warmup, length)
        if warmup > min(length, total_steps):
            which, shorter = ("run", total_steps) if total_steps <= length else ("schedule", length)
            raise UserError(
                f"optim.schedule.warmup is {warmup} steps, but the {which} has {shorter}; shorten it, or "
                "give it as a share of the run, such as 0.03"
            )
        rate = self._shape(peak, length, warmup)
        if length < total_steps and not jnp.any(rate(length)):
            raise UserError(
                f"optim.schedule.steps is {length}, and the run has {total_steps}: its last {total_steps - length} "
                "steps would have the rate 0; set optim.schedule.final, or leave steps out"
            )
        return rate

    def describe(self, peak: float, total_steps: int) -> str:
        """What `build` makes of it, in steps and rates."""
        rate, length = self.build(peak, total_steps), self.steps or total_steps
        warmup = _in_steps(self.warmup, length)
        text = f"{self.type}: {warmup} steps of warm-up to {peak:.3g}, {self._after(length)}"
        text += f"{np.asarray(rate(total_steps - 1)):.3g} at step {total_steps}"
        return text if length == total_steps else f"{text}, where the run ends; the schedule has {length} steps"

    @abstractmethod
    def _shape(self, peak: float, length: int, warmup: int) -> optax.Schedule: ...

    def _after(self, length: int) -> str:
        """What there is to say of the rate between the warm-up and the end."""
        return ""


class Constant(ScheduleConfig):
    type: Literal["constant"]

    def _shape(self, peak: float, length: int, warmup: int) -> optax.Schedule:
        return schedule.constant(peak, length, warmup)


class Linear(ScheduleConfig):
    type: Literal["linear"]
    final: NotNegative = 0.0
    """The rate after the schedule's last step, as a share of the peak."""

    def _shape(self, peak: float, length: int, warmup: int) -> optax.Schedule:
        return schedule.linear(peak, length, warmup, self.final)


class Cosine(ScheduleConfig):
    type: Literal["cosine"]
    final: NotNegative = 0.1
    """The rate after the schedule's last step, as a share of the peak."""

    def _shape(self, peak: float, length: int, warmup: int) -> optax.Schedule:
        return schedule.cosine(peak, length, warmup, self.final)


class WarmupStableDecay(ScheduleConfig):
    type: Literal["wsd"]
    decay: StepsOrShare = 0.2
    """Steps (a whole number), or share of the schedule (below 1), at its end in which the rate falls."""
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt"
    """How it falls: sqrt is 1 − √p, fast first."""
    final: NotNegative = 0.0
    """The rate after the schedule's last step, as a share of the peak."""

    def _shape(self, peak: float, length: int, warmup: int) -> optax.Schedule:
        decay = _in_steps(self.decay, length)
        if warmup + decay > length:
            raise UserError(
                f"optim.schedule.decay is {decay} steps, but after optim.schedule.warmup ({warmup} steps) "
                f"{length - warmup} of {length} are left; shorten one of them"
            )
        return schedule.wsd(peak, length, warmup, decay, self.final, self.shape)

    def _after(self, length: int) -> str:
        decay = _in_steps(self.decay, length)
        return f"stable until step {length - decay}, then {self.shape} decay to " if decay else ""


class InverseSqrt(ScheduleConfig):
    type: Literal["inverse_sqrt"]

    def _shape(self, peak: float, length: int, warmup: int) -> optax.Schedule:
        return schedule.inverse_sqrt(peak, length, warmup)


SCHEDULES = Registry[type[ScheduleConfig]]("schedule")
SCHEDULES.add("constant", Constant)
SCHEDULES.add("linear", Linear)
SCHEDULES.add("cosine", Cosine)
SCHEDULES.add("wsd", WarmupStableDecay)
SCHEDULES.add("inverse_sqrt", InverseSqrt)


class OptimizerConfig(Section):
    """What every optimizer's section has."""

    type: Any
    """The name of the optimizer, as each section narrows it."""
    learning_rate: Positive
    """The peak learning rate."""
    schedule: Annotated[ScheduleConfig, ByType(SCHEDULES)] = Cosine(type="cosine")
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, multiplied by the learning rate."""
    no_decay: tuple[str, ...] = ("*/bias", "*norm*/scale")
    """Patterns of the parameters without weight decay; one that matches nothing is no error."""

    has_statistics: ClassVar[bool] = False
    """Whether an entry's update depends on others of its tensor, which must then be one layer's matrix or vector."""

    @abstractmethod
    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        """The optimizer at the given schedule. `mask` gives True for each parameter that decays."""


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


OPTIMIZERS = Registry[type[OptimizerConfig]]("optimizer")
OPTIMIZERS.add("adamw", AdamW)
OPTIMIZERS.add("lion", Lion)
OPTIMIZERS.add("adan", Adan)
OPTIMIZERS.add("lomo", Lomo)
OPTIMIZERS.add("adalomo", AdaLomo)


def build(
    config: OptimizerConfig, total_steps: int, padded: Mapping[str, tuple[int, int]] | None = None
) -> tuple[optax.GradientTransformationExtraArgs, optax.Schedule]:
    """The transform and its learning-rate schedule (for logging) for a run of `total_steps` steps.

    padded: the parameters that are larger in memory than they are (`LM.padded`). The transform does not clip by the
    global norm: the step does, before it. Raises UserError for a warm-up longer than the run.
    """

    def decays(params: optax.Params) -> Any:
        return tree.match(params, "*", exclude=config.no_decay, allow_unmatched=True)

    rate = config.schedule.build(config.learning_rate, total_steps)
    tx = config.transform(rate, decays)
    if config.has_statistics:
        tx = without_padding(per_layer(tx), padded or {})
    return tx, rate
