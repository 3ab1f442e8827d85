"""What is minimised, and the losses that a step reports."""

from dataclasses import dataclass
from typing import NamedTuple

import jax


@dataclass(frozen=True)
class Objective:
    """What is minimised at a trained token, with logits z, `Z = Σ exp z`, and the target y of V tokens:

    `(1 − ε)·(log Z − z_y) + ε·(log Z − Σ z / V) + λ·log² Z`

    label_smoothing: ε, the share of the target's probability that all V tokens get in equal parts (Szegedy et al.,
    arXiv 1512.00567, section 7). z_loss: λ (Chowdhery et al., arXiv 2204.02311, section 5, with 1e-4), which keeps the
    logits from drifting. With both 0 it is the cross entropy.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0


CROSS_ENTROPY = Objective()


class Losses(NamedTuple):
    """Sums over trained tokens, scalars in at least float32.

    objective: what is minimised. cross_entropy: −log p(target), by which runs compare whatever they minimise.
    z_loss: the part `λ·log² Z` of the objective.
    """

    objective: jax.Array
    cross_entropy: jax.Array
    z_loss: jax.Array
