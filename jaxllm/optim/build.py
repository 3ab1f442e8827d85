"""The optimizers of the `optim:` section of a config, and what is built from one."""

from collections.abc import Mapping
from typing import Any

import optax
from pydantic import PositiveInt

from jaxllm import optim
from jaxllm.core import tree
from jaxllm.core.registry import Registry
from jaxllm.optim import wrapped
from jaxllm.optim.config import OptimizerConfig, section
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.galore import galore
from jaxllm.optim.prodigy import prodigy
from jaxllm.optim.wrappers import per_layer, without_padding

AdamW = section(optim.adamw)
Lion = section(optim.lion)
Adan = section(optim.adan)
Lomo = section(optim.lomo)
AdaLomo = section(optim.adalomo, has_statistics=True)


class SophiaG(section(optim.sophia_g, needs_whole_model="takes a second gradient of the whole model")):
    hessian_every: PositiveInt = 10
    """Updates between estimates of the curvature, each of which costs a second gradient."""

    def curvature(self) -> Curvature:
        return Curvature(self.hessian_every, self.rho)


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
OPTIMIZERS.add(
    "prodigy", section(prodigy, needs_whole_model="estimates one learning rate from the gradients of all layers")
)
OPTIMIZERS.add("muon", wrapped.Muon)
OPTIMIZERS.add("galore", section(galore, has_statistics=True, needs_whole_matrices=True))


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
