"""The `optim.schedule:` section of a config: how the learning rate moves over the run."""

from abc import abstractmethod
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
from pydantic import BeforeValidator, Field, PositiveInt

from jaxllm.core.config import Section
from jaxllm.core.config.bounds import WHOLE_NUMBERS
from jaxllm.core.errors import UserError
from jaxllm.core.registry import Registry
from jaxllm.optim import schedule

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _steps_or_share(value: Any) -> Any:
    is_steps = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= WHOLE_NUMBERS
    is_share = isinstance(value, float) and 0 <= value < 1
    if not (is_steps or is_share):
        raise ValueError(
            f"must be a number of steps (100), or a share of the run of at least 0.0 and below 1.0 (0.03), "
            f"got {value!r}"
        )
    return value


StepsOrShare = Annotated[int | float, BeforeValidator(_steps_or_share)]
"""A part of a run: an integer is a number of steps, a fraction is a share of all of them."""


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
