"""Methods that add nothing: a part of the parameters trains."""

from typing import Any, Literal

import jax
from pydantic import model_validator

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.models.lm import LM
from jaxllm.peft.base import METHODS, PeftConfig


class Freeze(PeftConfig):
    """Parameters are chosen by patterns of their paths, which `python -m jaxllm.convert inspect MODEL` lists."""

    type: Literal["freeze"]
    train: tuple[str, ...] = ("*",)
    """patterns of the parameters that train, such as layers/mlp/*; * also crosses /"""
    freeze: tuple[str, ...] = ()
    """patterns of those that do not, whatever train says, such as embed/*"""

    @model_validator(mode="after")
    def _freezes(self) -> "Freeze":
        if self.train == ("*",) and not self.freeze:
            raise ValueError("nothing is frozen; give train or freeze, or remove the section to train everything")
        return self

    def mask(self, lm: LM) -> Any:
        chosen = tree.match(lm.abstract(), *self.train, exclude=self.freeze)
        if not any(jax.tree.leaves(chosen)):
            raise UserError(
                f"peft.freeze {[*self.freeze]} leaves nothing to train of peft.train {[*self.train]}; shorten one"
            )
        return chosen


class BitFit(PeftConfig):
    """The biases train (Ben Zaken et al., arXiv 2106.10199)."""

    type: Literal["bitfit"]

    def mask(self, lm: LM) -> Any:
        chosen = tree.match(lm.abstract(), "*/bias", allow_unmatched=True)
        if not any(jax.tree.leaves(chosen)):
            raise UserError(
                f"peft.type is bitfit, which trains the biases, and this {lm.config.type} model has none; choose "
                "another method, such as peft: {type: freeze, train: ['*norm*']}"
            )
        return chosen


METHODS.add("freeze", Freeze)
METHODS.add("bitfit", BitFit)
