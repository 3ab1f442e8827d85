"""LISA (Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning", arXiv
2403.17919): it adds nothing, and trains other layers every so many steps.
"""

from typing import Any, Literal

import jax
from pydantic import PositiveInt

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.models.base import LM
from jaxllm.peft.base import METHODS, PeftConfig

LisaPolicy = Literal["reset_body", "reset_all", "keep"]


class Lisa(PeftConfig):
    """A few layers train at a time, drawn by the run's seed; embedding, last norm and head always do, by default."""

    type: Literal["lisa"]
    active_layers: PositiveInt = 2
    """layers that train at a time"""
    interval: PositiveInt = 20
    """steps after which others are drawn"""
    train_embed: bool = True
    """whether the embedding trains; of a large vocabulary it and the head are most of what does"""
    train_norm: bool = True
    """whether the last norm trains"""
    train_head: bool = True
    """whether the head trains; one that is tied to the embedding trains with it"""
    state: LisaPolicy = "reset_body"
    """what becomes of the optimizer's state when others are drawn: reset_body (the layers' starts anew), reset_all (all
    does, as in the paper's runs), keep (every layer has its own and goes on with it; it takes the memory of all)"""

    def mask(self, lm: LM) -> Any:
        layers = lm.config.num_hidden_layers
        if self.active_layers > layers:
            raise UserError(
                f"peft.active_layers is {self.active_layers} and the model has {layers} layers; set it to {layers} at "
                "the most"
            )
        switched = {"embed/*": self.train_embed, "norm/*": self.train_norm, "head/*": self.train_head}
        off = [pattern for pattern, on in switched.items() if not on]
        return tree.match(lm.abstract(), "*", exclude=off, allow_unmatched=True)

    def trained_at_a_time(self, lm: LM) -> int:
        chosen, _ = tree.partition(lm.abstract(), self.mask(lm))
        of_layers = sum(leaf.size for leaf in jax.tree.leaves(chosen.pop("layers")))
        others = sum(leaf.size for leaf in jax.tree.leaves(chosen))
        return others + self.active_layers * of_layers // lm.config.num_hidden_layers


METHODS.add("lisa", Lisa)
