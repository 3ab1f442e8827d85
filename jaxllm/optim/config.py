"""What the `optim:` section of every optimizer has."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar

import optax
from pydantic import Field

from jaxllm.core.config import ByType, Conflict, Section
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.schedule_config import SCHEDULES, Cosine, NotNegative, ScheduleConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DecayMask = Callable[[optax.Params], Any]


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
    needs_whole_matrices: ClassVar[bool] = False
    """Whether a device needs a whole matrix to update it. The step then updates one layer at a time."""
    needs_whole_model: ClassVar[str] = ""
    """Why the layers cannot be updated one by one; empty where they can."""

    averages: ClassVar[str] = ""
    """The tree of the state that `evaluation_params` needs; empty where the trained parameters are evaluated."""

    def conflicts(self, rates: Mapping[str, float]) -> Iterator[Conflict]:
        """What contradicts the rates that the method of fine-tuning multiplies updates by, `PeftConfig.rates`."""
        if self.averages and rates:
            yield Conflict(
                f"peft.loraplus_lr_ratio scales updates, and the averages of optim {self.type} would not follow",
                "set loraplus_lr_ratio to 1, or choose another optimizer",
            )

    def evaluation_params(self, params: Any, averaged: Any) -> Any:
        """What is evaluated and exported, of trained parameters and the tree `averages` of the optimizer's state."""
        del averaged
        return params

    def curvature(self) -> Curvature | None:
        """When the transform is given an estimate of the curvature, as `hessian_grads`; None = never."""
        return None

    @abstractmethod
    def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
        """The optimizer at the given schedule. `mask` gives True for each parameter that decays."""
