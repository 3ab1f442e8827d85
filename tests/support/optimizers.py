"""Every optimizer of the config, for small models."""

from typing import Any

from jaxllm.optim.build import OPTIMIZERS
from jaxllm.optim.config import OptimizerConfig

# With all parts of an optimizer that may be left out, for matrices of any size and runs of few steps.
SETTINGS: dict[str, dict[str, Any]] = {
    "adafactor": {"min_dim_size_to_factor": 1},
    "galore": {"rank": 3, "update_proj_gap": 2},
    "lomo": {"learning_rate": 0.05},
    "prodigy": {"learning_rate": 1.0, "estim_lr0": 1e-4},
    # Ten of its steps along one direction add up, and each is by a gradient over its own size: the last bits grow.
    "rmsprop": {"learning_rate": 1e-3, "momentum": 0.9},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "sophia_g": {"hessian_every": 2},
}


def section(name: str, **settings: Any) -> OptimizerConfig:
    """The section of the optimizer `name`, with weight decay."""
    values = {"type": name, "learning_rate": 1e-2, "weight_decay": 0.1, **SETTINGS.get(name, {}), **settings}
    return OPTIMIZERS[name].model_validate(values)
