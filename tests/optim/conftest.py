"""Recorded trajectories of the original optimizers."""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import optim

NAMES = ("w1", "w2", "b")


class Golden:
    """One recorded run: the transform with its settings, and arrays by parameter name."""

    def __init__(self, file: Path) -> None:
        self.arrays = np.load(file)
        meta = json.loads(str(self.arrays["meta"]))
        self.optimizer, self.hyper = meta["optimizer"], meta["hyper"]
        self.tx = self._transform()

    def _transform(self) -> optax.GradientTransformationExtraArgs:
        rates = jnp.asarray(self.arrays["lr"], jnp.float32)
        hyper = {k: v for k, v in self.hyper.items() if k not in ("lr", "lr_schedule", "param_dtype")}
        if self.optimizer == "adalomo":
            del hyper["loss_scale"]  # it cancels before the rule sees the gradient
            hyper["decay_rate"] = -hyper["decay_rate"]
        if self.optimizer == "sophiag":
            del hyper["eps"], hyper["hessian_interval"]
            hyper["batch_tokens"] = hyper.pop("bs")
        make = getattr(optim, {"sophiag": "sophia_g"}.get(self.optimizer, self.optimizer))
        return make(lambda step: rates[step], **hyper)

    def tree(self, prefix: str) -> dict[str, np.ndarray]:
        return {name: self.arrays[f"{prefix}/{name}"] for name in NAMES}

    def states(self, moment: str) -> dict[str, dict[str, np.ndarray]]:
        """`{state name: {parameter: array}}` at "step1" or "step20"."""
        found: dict[str, dict[str, np.ndarray]] = {}
        for key in self.arrays:
            if key.startswith(f"state/{moment}/"):
                _, _, state, parameter = key.split("/")
                found.setdefault(state, {})[parameter] = self.arrays[key]
        return found

    def hessian_gradients(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """For each step whether the Hessian moves, and its gradients (zeros where it does not)."""
        moves = np.zeros(20, bool)
        moves[self.arrays["hess_steps"] - 1] = True
        grads = {}
        for name, some in self.tree("hess_grads").items():
            grads[name] = np.zeros((20, *some.shape[1:]), np.float32)
            grads[name][moves] = some
        return moves, grads


@pytest.fixture(scope="session")
def golden_folder(shared: Path) -> Path:
    return shared / "golden" / "optimizers"


@pytest.fixture(scope="session")
def golden(golden_folder: Path) -> Callable[[str], Golden]:
    """`golden("adan_A1")` reads one recorded run."""
    return lambda name: Golden(golden_folder / f"{name}.npz")
