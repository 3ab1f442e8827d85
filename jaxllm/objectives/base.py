"""What is minimised: from scores of tokens to the losses that a step differentiates and reports."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp


class TokenScores(NamedTuple):
    """What the logits z of a model say of each token, `[B, T]` in at least float32.

    logprob: the log of the target's probability. log_z: log Σ exp z. mean_logit: Σ z / V over the V tokens of the
    vocabulary; None for an objective whose `reads_mean_logit` is false.
    """

    logprob: jax.Array
    log_z: jax.Array
    mean_logit: jax.Array | None = None


class Losses(NamedTuple):
    """Sums over trained tokens, scalars in at least float32.

    objective: what is minimised. cross_entropy: −log p(target), by which runs compare whatever they minimise.
    parts: parts of the objective that are reported as metrics, by their names.
    """

    objective: jax.Array
    cross_entropy: jax.Array
    parts: Mapping[str, jax.Array] = {}


class Objective(Protocol):
    """`(scores, batch, aux) -> Losses`: what is minimised of a micro-batch.

    scores: of its tokens. batch: its arrays, `loss_mask` `[B, T]` among them, which is 1 where a target is trained. The
    step divides the sums by the trained tokens of the whole batch, so a sum over tokens does not depend on how the
    batch is cut; anything else is of one micro-batch. aux: the statistics of the model's layers, summed over these and
    over the whole batch, in a pipeline over one micro-batch; None where it has none. A term of them that is multiplied
    by the micro-batch's trained tokens counts once in the mean. A function that lacks `reads_mean_logit` is given
    `scores.mean_logit`.
    """

    def __call__(
        self, scores: TokenScores, batch: Mapping[str, jax.Array], aux: Mapping[str, jax.Array] | None, /
    ) -> Losses: ...


def reads_mean_logit(objective: Objective) -> bool:
    """Whether `objective` needs `TokenScores.mean_logit`, which takes one more pass over the logits."""
    return getattr(objective, "reads_mean_logit", True)


def cross_entropy(scores: TokenScores, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The sum of −log p(target) over the trained tokens of a micro-batch."""
    return jnp.sum(-scores.logprob * batch["loss_mask"].astype(scores.logprob.dtype))


@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy, with label smoothing and z-loss. At a trained token with the target y:

    `(1 − ε)·(log Z − z_y) + ε·(log Z − Σ z / V) + λ·log² Z`

    label_smoothing: ε, the share of the target's probability that all V tokens get in equal parts (Szegedy et al.,
    arXiv 1512.00567, section 7). z_loss: λ (Chowdhery et al., arXiv 2204.02311, section 5, with 1e-4), which keeps the
    logits from drifting; it is reported as `z_loss`.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def reads_mean_logit(self) -> bool:
        return bool(self.label_smoothing)

    def __call__(
        self, scores: TokenScores, batch: Mapping[str, jax.Array], aux: Mapping[str, jax.Array] | None = None, /
    ) -> Losses:
        del aux
        mask, nll = batch["loss_mask"].astype(scores.log_z.dtype), cross_entropy(scores, batch)
        total, parts = nll, {}
        if share := self.label_smoothing:
            assert scores.mean_logit is not None
            total = (1 - share) * nll + share * jnp.sum((scores.log_z - scores.mean_logit) * mask)
        if self.z_loss:
            parts["z_loss"] = self.z_loss * jnp.sum(jnp.square(scores.log_z) * mask)
            total += parts["z_loss"]
        return Losses(total, nll, parts)


CROSS_ENTROPY = CrossEntropy()
