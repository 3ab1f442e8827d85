"""The reallocation of AdaLoRA's triplets: an optimizer that also weighs them, and takes away what is worth least.

Zhang et al., arXiv 2303.10512, algorithm 1, in the order of HF PEFT: with the gradient of a step and the parameters
after its update.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.core import tree
from jaxllm.core.tree import Params

OF_TRIPLETS = ("lora_a", "lora_b", "lora_e")


class AdaLoraState(NamedTuple):
    """The state of `reallocating`.

    step: int32 scalar, updates done. inner: of the optimizer. sensitivity, uncertainty: of each entry of the triplets
    the moving averages of equations 9 and 10; of parameters that are none, a 0 in their place.
    """

    step: Any
    inner: optax.OptState
    sensitivity: Params
    uncertainty: Params


def reallocating(
    tx: optax.GradientTransformationExtraArgs,
    budgets: np.ndarray,
    places: Mapping[str, np.ndarray],
    *,
    begin: int,
    every: int,
    decays: tuple[float, float],
) -> optax.GradientTransformationExtraArgs:
    """`tx`, after whose updates the values `lora_e` are 0 of triplets that are not kept.

    budgets: how many are kept after each step, of all matrices together, as `AdaLora.budgets` has them. places: by the
    folder of the triplets beside a stack of matrices, the places in the stack that have some. It is decided anew which
    ones are kept `every` so many steps, after step `begin`.

    With the decays of Ī and Ū, a triplet is worth s = s(e) + the mean of
    s over its vector in lora_a + that in lora_b, where s of an entry θ with the gradient g is Ī·Ū: Ī is the moving
    average of I = |θ·g|, and Ū that of |I − Ī|. After the last step of `budgets` the averages stand still, and so does
    what they choose. Between two choices a value that was set to 0 may grow again.
    """
    of_sensitivity, of_uncertainty = decays
    last = len(budgets) - 1

    def init(params: optax.Params) -> AdaLoraState:
        def zeros(path: str, leaf: jax.Array) -> jax.Array:
            return jnp.zeros_like(leaf) if _is_of_triplets(path) else jnp.zeros((), leaf.dtype)

        averages = (tree.map_with_path(zeros, params) for _ in range(2))
        return AdaLoraState(jnp.zeros((), jnp.int32), tx.init(params), *averages)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, AdaLoraState]:
        new: Any
        new, of_inner = tx.update(updates, state.inner, params, **extra_args)
        step = state.step + 1
        leaves, moved, grads = map(tree.flatten, (params, new, updates))

        def averaged(before: Params, values: dict[str, jax.Array], decay: float) -> dict[str, jax.Array]:
            means = {path: tree.at(before, path) for path in values}
            return {
                path: jnp.where(step < last, decay * means[path] + (1 - decay) * value, means[path])
                for path, value in values.items()
            }

        weights = {
            path: jnp.abs((leaf + moved[path]) * grads[path]) for path, leaf in leaves.items() if _is_of_triplets(path)
        }
        means = averaged(state.sensitivity, weights, of_sensitivity)
        off = {path: jnp.abs(weight - means[path]) for path, weight in weights.items()}
        spreads = averaged(state.uncertainty, off, of_uncertainty)

        scores = {folder: _scores(means, spreads, folder) for folder in places}
        of_all = [scores[folder][of_folder].ravel() for folder, of_folder in places.items()]
        gone = budgets[0] - jnp.asarray(budgets)[jnp.minimum(step, last)]
        highest = jnp.sort(jnp.concatenate(of_all))[jnp.maximum(gone, 1) - 1]  # of the scores of those that go
        chooses = (step > begin) & ((step % every == 0) | (step >= last)) & (gone > 0)
        for folder, score in scores.items():
            value = f"{folder}/lora_e"
            moved[value] = jnp.where(chooses & (score <= highest), -leaves[value], moved[value])
        after = AdaLoraState(
            step, of_inner, tree.insert(state.sensitivity, means), tree.insert(state.uncertainty, spreads)
        )
        return tree.insert(new, moved), after

    return optax.GradientTransformationExtraArgs(init, update)


def _is_of_triplets(path: str) -> bool:
    return path.rpartition("/")[2] in OF_TRIPLETS


def _scores(sensitivity: dict[str, jax.Array], uncertainty: dict[str, jax.Array], folder: str) -> jax.Array:
    """What the triplets in `folder` are worth, `[L, r]`."""
    paths = (f"{folder}/{name}" for name in OF_TRIPLETS)
    a, b, e = (sensitivity[path] * uncertainty[path] for path in paths)
    return e + jnp.mean(a, axis=1) + jnp.mean(b, axis=2)
