"""What the `optim:` section of every optimizer has, and the section that an optimizer's function describes."""

import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import GenericAlias
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import optax
from pydantic import Field, NonNegativeInt, PositiveInt, create_model

from jaxllm.core.config import ByType, Conflict, OnResume, Section
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.schedule_config import SCHEDULES, Cosine, NotNegative, ScheduleConfig
from jaxllm.optim.wrappers import layer_matrices

Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
DecayMask = Callable[[optax.Params], Any]


class OptimizerConfig(Section):
    """What every optimizer's section has."""

    type: Annotated[Any, OnResume.REFUSED]
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


_SHARED = ("learning_rate", "weight_decay")  # keys of every optimizer, whose defaults a function may change
_GIVEN = ("choose", "mask")  # not keys: the section knows which parameters are layers' matrices, and which decay
_OF_THE_STEP = ("clip_grad_norm", "clip_grad_value", "max_grad_norm", "batch_tokens")  # not keys: the step does it
_DECAYS = ("b1", "b2", "b3", "beta", "momentum")


def section(
    function: Callable[..., optax.GradientTransformationExtraArgs],
    *,
    has_statistics: bool = False,
    needs_whole_matrices: bool = False,
    needs_whole_model: str = "",
) -> type[Any]:
    """The section of the optimizer that `function` returns. Its type is the function's name.

    Its keys are the function's parameters, with their defaults; the meaning of a key is its entry below "Args:" in the
    docstring. Decays (`b1`, `b2`, `b3`, `beta`, `momentum`) are at least 0 and below 1. Other numbers are positive, or
    not negative where the default is 0.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    meanings = _meanings(inspect.getdoc(function) or "")
    own = [name for name in parameters if name not in (*_SHARED, *_GIVEN, *_OF_THE_STEP)]
    choose = {"choose": layer_matrices} if "choose" in parameters else {}

    class OfFunction(OptimizerConfig):
        def transform(self, rate: optax.Schedule, mask: DecayMask) -> optax.GradientTransformationExtraArgs:
            settings = {name: getattr(self, name) for name in own}
            return function(rate, weight_decay=self.weight_decay, mask=mask, **settings, **choose)

    fields: dict[str, Any] = {"type": (Literal[function.__name__], ...)}
    for name in _SHARED:
        if (default := parameters[name].default) is not inspect.Parameter.empty:
            shared = OptimizerConfig.model_fields[name]
            fields[name] = shared.rebuild_annotation(), Field(default, description=shared.description)
    for name in own:
        kind, default = parameters[name].annotation, parameters[name].default
        fields[name] = _bounded(name, kind, default), Field(default, description=meanings.get(name))
    made = create_model(function.__name__, __base__=OfFunction, __doc__=function.__doc__, **fields)
    made.has_statistics = has_statistics
    made.needs_whole_matrices = needs_whole_matrices
    made.needs_whole_model = needs_whole_model
    return made


def _bounded(name: str, kind: Any, default: Any = None) -> Any:
    """The type of a key: `kind` with its bounds."""
    if name in _DECAYS:
        return Decay
    if kind is float:
        return NotNegative if default == 0 else Positive
    if kind is int:
        return NonNegativeInt if default == 0 else PositiveInt
    if get_origin(kind) is tuple:
        return GenericAlias(tuple, tuple(_bounded(name, part) for part in get_args(kind)))
    return kind


def _meanings(docstring: str) -> dict[str, str]:
    """The entries below "Args:", each on one line and with a capital."""
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", docstring.partition("\nArgs:\n")[2], re.MULTILINE)
    return {name: text[0].upper() + " ".join(text.split())[1:] for name, text in entries}
