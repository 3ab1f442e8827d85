"""What a method of parameter-efficient fine-tuning is: extra leaves, a mask over the parameters, and nothing else.

The leaves that a method adds are found by the layer that they stand beside (`nn/linear.py`), so a model with an adapter
is the same model with more leaves. What trains gets gradients and optimizer state; what does not has neither.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import optax

from jaxllm.core import tree
from jaxllm.core.config import Conflict, Section
from jaxllm.core.mesh import MeshConfig
from jaxllm.core.registry import Registry
from jaxllm.core.tree import Params
from jaxllm.hf.export import save
from jaxllm.models.lm import LM
from jaxllm.models.quantized import Quantization
from jaxllm.peft.layer_sampling import LayerDraws, drawing_conflicts
from jaxllm.peft.sections import OptimSection, TrainSection


class SharedPart(NamedTuple):
    """A part of a method that all layers of the model share. without: the setting that removes it."""

    description: str
    without: str


class PeftConfig(Section):
    """What every method has. By default it adds nothing and trains everything."""

    type: Any
    """The name of the method, as each section narrows it."""

    exported_to: ClassVar[str] = "export/hf"
    """Where a run's result is in its folder."""
    exported_for: ClassVar[str] = "transformers"
    """What loads it."""

    merges: ClassVar[bool] = True
    """Whether what it adds can be merged into the model's own parameters."""

    draws_because: ClassVar[str] = "peft.lisa is set"
    """The setting that `draws` comes from, in messages."""

    compares_layers: ClassVar[bool] = False
    """Whether `transform` weighs the layers against each other, so that they must be updated together."""
    follows_length: ClassVar[str] = ""
    """What of `transform` depends on the number of the run's steps, in a message; empty for nothing."""

    def conflicts_with_new_model(self) -> Iterator[Conflict]:
        """What contradicts a model that is new."""
        yield from ()

    def conflicts_with_quantization(self, quantization: Quantization) -> Iterator[Conflict]:
        """What contradicts a model whose matrices are stored in `quantization`."""
        yield Conflict(
            f"model.quantize is {quantization}, whose matrices do not train, and peft.type is {self.type}, whose "
            "result is the whole model",
            "choose an adapter, such as peft: {type: lora}, or remove quantize",
        )

    def conflicts(self, optim: OptimSection, train: TrainSection) -> Iterator[Conflict]:
        """What contradicts the optimizer or the way to train."""
        if self.draws is not None:
            yield from drawing_conflicts(self.draws_because, optim, train)

    def conflicts_with_mesh(self, mesh: MeshConfig) -> Iterator[Conflict]:
        """What contradicts the mesh."""
        del mesh
        yield from ()

    @property
    def shared_part(self) -> SharedPart | None:
        """The part that all layers share, which no step can train that sees one layer at a time; None for none."""
        return None

    def add(self, lm: LM) -> LM:
        """`lm` with the leaves that the method adds. Raises UserError where it does not fit the model."""
        return lm

    def mask(self, lm: LM) -> Any:
        """For each leaf of `lm`, a result of `add`, whether it trains. Raises UserError if none does."""
        return tree.match(lm.abstract(), "*")

    def begun(self, lm: LM, load: Callable[[], Params], tokenize: Callable[[str], list[int]]) -> Callable[[], Params]:
        """What loads the parameters of `lm` by `load`, with those leaves of the method that start from a text.

        Raises UserError for a text without tokens.
        """
        del lm, tokenize
        return load

    @property
    def draws(self) -> LayerDraws | None:
        """Which of the layers train at a time; None for all."""
        return None

    def trained_at_a_time(self, lm: LM) -> int:
        """How many parameters of `lm`, a result of `add`, train in a step. Raises UserError as `mask` does."""
        chosen = tree.flatten(tree.partition(lm.abstract(), self.mask(lm))[0])
        every = sum(leaf.size for leaf in chosen.values())
        if self.draws is None:
            return every
        of_layers = sum(leaf.size for path, leaf in chosen.items() if path.startswith("layers/"))
        return every - of_layers + self.draws.active_layers * of_layers // lm.config.num_hidden_layers

    def rates(self) -> Mapping[str, float]:
        """By a pattern of paths, what the updates of these leaves are multiplied by."""
        return {}

    def transform(
        self, tx: optax.GradientTransformationExtraArgs, lm: LM, steps: int
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a run of `steps` steps of `lm`, a result of `add`, made of the one that `optim` asks for.

        Raises UserError where the method does not fit a run of that length.
        """
        del lm, steps
        return tx

    def penalty(self, lm: LM) -> Callable[[Params], jax.Array] | None:
        """What is added to what is minimised: a scalar of the leaves of `lm` that train. None for nothing."""
        del lm
        return None

    def export(self, lm: LM, params: Params, folder: Path, *, model_folder: Path, base: str | None) -> None:
        """Writes the result of a run into `folder`, for the library that `exported_for` names.

        lm: a result of `add`. model_folder: with its config.json and tokenizer. base: the model that the run started
        from; None for a new one.
        """
        save(lm, params, folder, model_folder=model_folder)


def describe(method: PeftConfig, lm: LM) -> str:
    """How much of `lm`, a result of `add`, trains. Raises UserError if nothing does."""
    count, total = method.trained_at_a_time(lm), sum(leaf.size for leaf in jax.tree.leaves(lm.plain.abstract()))
    return f"{method.type}: {count:,} of {total:,} parameters train at a time ({count / total:.3%})"


METHODS = Registry[type[PeftConfig]]("PEFT method")


class Full(PeftConfig):
    """Every parameter trains."""

    type: Literal["full"]


METHODS.add("full", Full)
