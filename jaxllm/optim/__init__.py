"""Optimizers as optax transforms: exact where optax or the reference implementations are not.

Each returns an `optax.GradientTransformationExtraArgs` for use in any optax loop. State and arithmetic
are at least float32 whatever the dtype of the parameters; the updates that they return have the dtype of the gradients.
"""

from jaxllm.optim.adalomo import adalomo
from jaxllm.optim.adamw import adamw
from jaxllm.optim.adan import adan
from jaxllm.optim.lion import lion
from jaxllm.optim.lomo import lomo
from jaxllm.optim.sophia_g import sophia_g

__all__ = ["adalomo", "adamw", "adan", "lion", "lomo", "sophia_g"]
