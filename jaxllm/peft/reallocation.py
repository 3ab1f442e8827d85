"""The reallocation of AdaLoRA's triplets: an optimizer that also weighs them, and takes away what is worth least.

Zhang et al., arXiv 2303.10512, algorithm 1, in the order of HF PEFT: with the gradient of a step and the parameters
after its update.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.core import tree
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM
from jaxllm.peft.adalora import AdaLora

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
    tx: optax.GradientTransformation, method: AdaLora, lm: LM, steps: int
) -> optax.GradientTransformationExtraArgs:
    """`tx` in a run of `steps` steps, after whose updates the values `lora_e` are 0 of triplets that are not kept.

    `budgets` of the method says how many are kept, of all matrices together. A triplet is worth s = s(e) + the mean of
    s over its vector in lora_a + that in lora_b, where s of an entry θ with the gradient g is Ī·Ū: Ī is the moving
    average of I = |θ·g|, and Ū that of |I − Ī|. In the last `tfinal` steps the averages stand still, and so does what
    they choose. Between two choices a value that was set to 0 may grow again.

    Raises UserError for a run that is too short.
    """
    inner = optax.with_extra_args_support(tx)
    budgets, targets = method.budgets(lm, steps), method.target_layers(lm)
    places = {module.folder: np.flatnonzero(np.array(layers)[lm.layer_order]) for module, layers in targets}
    last = len(budgets) - 1

    def init(params: optax.Params) -> AdaLoraState:
        def zeros(path: str, leaf: jax.Array) -> jax.Array:
            return jnp.zeros_like(leaf) if _is_of_triplets(path) else jnp.zeros((), leaf.dtype)

        averages = (tree.map_with_path(zeros, params) for _ in range(2))
        return AdaLoraState(jnp.zeros((), jnp.int32), inner.init(params), *averages)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, AdaLoraState]:
        new: Any
        new, of_inner = inner.update(updates, state.inner, params, **extra_args)
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
        means = averaged(state.sensitivity, weights, method.beta1)
        off = {path: jnp.abs(weight - means[path]) for path, weight in weights.items()}
        spreads = averaged(state.uncertainty, off, method.beta2)

        scores = {module.folder: _scores(means, spreads, module.folder) for module, _ in targets}
        every = [scores[folder][of_folder].ravel() for folder, of_folder in places.items()]
        gone = budgets[0] - jnp.asarray(budgets)[jnp.minimum(step, last)]
        highest = jnp.sort(jnp.concatenate(every))[jnp.maximum(gone, 1) - 1]  # of the scores of those that go
        chooses = (step > method.tinit) & ((step % method.deltaT == 0) | (step >= last)) & (gone > 0)
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
