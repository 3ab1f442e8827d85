"""Which layers train at a time, as LISA draws them (Pan et al., arXiv 2403.17919)."""

from typing import Literal

from pydantic import PositiveInt

from jaxllm.core.config import Section
from jaxllm.core.errors import UserError
from jaxllm.models.lm import LM

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
