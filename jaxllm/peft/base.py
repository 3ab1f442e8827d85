"""What a method of parameter-efficient fine-tuning is: a section of a config with hooks (see README.md).

The leaves that a method adds are found by the layer that they stand beside (`nn/linear.py`), so a model with an adapter
is the same model with more leaves. What trains gets gradients and optimizer state; what does not has neither.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import numpy as np
import optax
from pydantic import model_validator

from jaxllm.core import tree
from jaxllm.core.config import Conflict, Section
from jaxllm.core.errors import UserError
from jaxllm.core.finite import check_finite
from jaxllm.core.mesh import MeshConfig
from jaxllm.core.registry import Registry
from jaxllm.core.tree import Params
from jaxllm.hf.export import save
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.models.quantized import Quantization
from jaxllm.peft.files import EXPORTED_TO, AdapterFiles, OwnWeights, Part, on_host, write_adapter, write_parts
from jaxllm.peft.layer_sampling import LayerDraws, drawing_conflicts
from jaxllm.peft.sections import OptimSection, TrainSection
from jaxllm.peft.targets import Targets


class SharedPart(NamedTuple):
    """A part of a method that all layers of the model share. without: the setting that removes it."""

    description: str
    without: str


class PeftConfig(Section):
    """A method. By default it adds nothing, trains everything, and its result is the whole model."""

    type: Any
    """The name of the method, as each section narrows it."""

    files: ClassVar[AdapterFiles | None] = None
    """How the files of HF PEFT describe its adapter; None for a method whose result is the whole model."""
    merges: ClassVar[bool] = True
    """Whether what it adds can be merged into the model's own parameters."""
    draws_because: ClassVar[str] = "peft.lisa is set"
    """The setting that `draws` comes from, in messages."""
    compares_layers: ClassVar[bool] = False
    """Whether `transform` weighs the layers against each other, so that they must be updated together."""
    follows_length: ClassVar[str] = ""
    """What of `transform` depends on the number of the run's steps, in a message; empty for nothing."""

    # What it is made of

    @property
    def targets(self) -> Targets | None:
        """The modules that it is for, of a method that is for some."""
        return None

    @property
    def draws(self) -> LayerDraws | None:
        """Which of the layers train at a time; None for all."""
        return None

    @property
    def shared_part(self) -> SharedPart | None:
        """The part that all layers share, which no step can train that sees one layer at a time; None for none."""
        return None

    def leaves(self, lm: LM) -> Mapping[str, ExtraLeaf]:
        """By their paths, the leaves that it adds to `lm`. Raises UserError where it does not fit the model."""
        del lm
        return {}

    def settings(self) -> Mapping[str, Any]:
        """The fields of `LM` that go with the leaves."""
        return {}

    # What contradicts it

    @model_validator(mode="after")
    def _has_sound_targets(self) -> "PeftConfig":
        if self.targets is not None:
            self.targets.check()
        return self

    def conflicts_with_new_model(self) -> Iterator[Conflict]:
        """What contradicts a model that is new."""
        if self.files is not None:
            yield Conflict(
                f"peft.type is {self.type}, whose result is the adapter of a pretrained model, and model is new",
                "give model.path, or remove the peft section",
            )

    def conflicts_with_quantization(self, quantization: Quantization) -> Iterator[Conflict]:
        """What contradicts a model whose matrices are stored in `quantization`."""
        if self.files is None:
            yield Conflict(
                f"model.quantize is {quantization}, whose matrices do not train, and peft.type is {self.type}, whose "
                "result is the whole model",
                "choose an adapter, such as peft: {type: lora}, or remove quantize",
            )

    def conflicts(self, optim: OptimSection, train: TrainSection) -> Iterator[Conflict]:
        """What contradicts the optimizer or the way to train."""
        if self.draws is not None:
            yield from drawing_conflicts(self.draws_because, optim)

    def conflicts_with_mesh(self, mesh: MeshConfig) -> Iterator[Conflict]:
        """What contradicts the mesh."""
        del mesh
        yield from ()

    # What trains, and how

    def add(self, lm: LM) -> LM:
        """`lm` with the leaves that the method adds. Raises UserError where it does not fit the model."""
        return replace(lm, extra={**lm.extra, **self.leaves(lm)}, **self.settings())

    def mask(self, lm: LM) -> Any:
        """For each leaf of `lm`, a result of `add`, whether it trains. Raises UserError if none does."""
        if self.files is None:
            return tree.match(lm.abstract(), "*")
        if self.draws is not None and self.targets is not None:
            self.targets.check_draws(self.draws, lm)
        chosen = self.own_weights(lm).trained
        if lm.quantization is not None and (stored := sorted(filter(lm.quantization.replaces, chosen))):
            raise UserError(
                f"peft.modules_to_save trains {stored[0]}, which model.quantize stores in {lm.quantization}; leave it "
                "out, or remove quantize"
            )
        return tree.map_with_path(
            lambda path, _: path in chosen or (path in lm.extra and not lm.extra[path].frozen), lm.abstract()
        )

    def begun(self, lm: LM, load: Callable[[], Params], tokenize: Callable[[str], list[int]]) -> Callable[[], Params]:
        """What loads the parameters of `lm` by `load`, with those leaves of the method that start from a text.

        Raises UserError for a text without tokens.
        """
        del lm, tokenize
        return load

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

    # The files of its result

    @property
    def exported_to(self) -> str:
        """Where a run's result is in its folder."""
        return "export/hf" if self.files is None else EXPORTED_TO

    @property
    def exported_for(self) -> str:
        """What loads it."""
        return "transformers" if self.files is None else "HF peft"

    def computes(self, lm: LM) -> Any:
        """What two sections that describe the same adapter of `lm` have in common."""
        del lm
        return self._described()

    def finished(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The leaves that the files have, made of those that were trained."""
        del lm
        return leaves

    def description(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """adapter_config.json, but for what every adapter has there. leaves: a result of `finished`."""
        del leaves
        return self._described() | ({} if self.targets is None else self.targets.description(lm))

    def parts(self, lm: LM, described: Mapping[str, Any]) -> list[Part]:
        """Which tensors of the files are which parts of the leaves. described: adapter_config.json."""
        del lm, described
        return []

    def own_weights(self, lm: LM) -> OwnWeights:
        """The model's own parameters that the files have. Raises UserError for one that `lm` lacks."""
        return OwnWeights() if self.targets is None else self.targets.own_weights(lm)

    def export(self, lm: LM, params: Params, folder: Path, *, model_folder: Path, base: str | None) -> None:
        """Writes the result of a run into `folder`, for the library that `exported_for` names.

        lm: a result of `add`. model_folder: with its config.json and tokenizer. base: the model that the run started
        from; None for a new one. Raises UserError for parameters that are not finite.
        """
        if self.files is None:
            save(lm, params, folder, model_folder=model_folder)
            return
        every, own = tree.flatten(params), self.own_weights(lm)
        written = {path: every[path] for path in (*lm.extra, *own.trained, *own.untrained)}
        check_finite(written, f"{folder}: not written", "Go on from an earlier checkpoint")
        leaves = self.finished(lm, {path: on_host(lm, every[path]) for path in lm.extra})
        of_every_adapter = {
            "peft_type": self.files.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
        }
        described = self.description(lm, leaves)
        tensors = write_parts(self.parts(lm, described), leaves) | own.tensors(lm, every)
        write_adapter(folder, tensors, of_every_adapter | described)

    def _described(self) -> dict[str, Any]:
        return {} if self.files is None else self.model_dump(mode="json", include={*self.files.described})


def describe(method: PeftConfig, lm: LM) -> str:
    """How much of `lm`, a result of `add`, trains. Raises UserError if nothing does."""
    count, total = method.trained_at_a_time(lm), sum(leaf.size for leaf in jax.tree.leaves(lm.plain.abstract()))
    return f"{method.type}: {count:,} of {total:,} parameters train at a time ({count / total:.3%})"


METHODS = Registry[type[PeftConfig]]("PEFT method")

ADAPTERS = Registry[type[PeftConfig]]("peft_type")
"""By what HF PEFT calls it, the method that trains the adapter in such files."""


class Full(PeftConfig):
    """Every parameter trains."""

    type: Literal["full"]


METHODS.add("full", Full)
