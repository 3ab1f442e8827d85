"""LISA (Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", arXiv
2403.17919): it adds nothing, and trains other layers every so many steps.
"""

from typing import Any, ClassVar, Literal

from jaxllm.core import tree
from jaxllm.models.lm import LM
from jaxllm.peft.base import METHODS, PeftConfig
from jaxllm.peft.layer_sampling import LayerDraws


class Lisa(LayerDraws, PeftConfig):
    """A few layers train at a time, drawn by the run's seed; embedding, last norm and head always do, by default."""

    type: Literal["lisa"]
    train_embed: bool = True
    """whether the embedding trains; of a large vocabulary it and the head are most of what does"""
    train_norm: bool = True
    """whether the last norm trains"""
    train_head: bool = True
    """whether the head trains; one that is tied to the embedding trains with it"""

    draws_because: ClassVar[str] = "peft.type is lisa"

    @property
    def draws(self) -> LayerDraws:
        return self

    def mask(self, lm: LM) -> Any:
        self.check(lm, "peft")
        switched = {"embed/*": self.train_embed, "norm/*": self.train_norm, "head/*": self.train_head}
        off = [pattern for pattern, on in switched.items() if not on]
        return tree.match(lm.abstract(), "*", exclude=off, allow_unmatched=True)


METHODS.add("lisa", Lisa)
