"""Which layers train at a time, as LISA draws them (Pan et al., arXiv 2403.17919)."""

from collections.abc import Iterator
from typing import Literal

from pydantic import PositiveInt

from jaxllm.core.config import Conflict, Section
from jaxllm.core.errors import UserError
from jaxllm.models.lm import LM
from jaxllm.peft.sections import OptimSection

LisaPolicy = Literal["reset_body", "reset_all", "keep"]


class LayerDraws(Section):
    """A few layers train at a time, drawn by the run's seed; what belongs to no layer always does."""

    active_layers: PositiveInt = 2
    """layers that train at a time"""
    interval: PositiveInt = 20
    """steps after which others are drawn"""
    state: LisaPolicy = "reset_body"
    """what becomes of the optimizer's state when others are drawn: reset_body (the layers' starts anew), reset_all (all
    does, as in the paper's runs), keep (every layer has its own and goes on with it; it takes the memory of all)"""

    def check(self, lm: LM, key: str) -> None:
        """Raises UserError, with the config's `key` of this section, for a model of fewer layers."""
        layers = lm.config.num_hidden_layers
        if self.active_layers > layers:
            raise UserError(
                f"{key}.active_layers is {self.active_layers} and the model has {layers} layers; set it to {layers} at "
                "the most"
            )


def drawing_conflicts(because: str, optim: OptimSection) -> Iterator[Conflict]:
    """What contradicts drawing the layers that train. because: the setting that asks for it, as a message names it."""
    if alone := optim.needs_whole_model or (optim.averages and "evaluates an average of what it trains"):
        yield Conflict(
            f"{because}, which gives each layer an optimizer of its own, and optim.type {optim.type} {alone}",
            "choose another optimizer, such as adamw",
        )
