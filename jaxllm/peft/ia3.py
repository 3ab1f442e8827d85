"""IA³: vectors by which the inputs or outputs of matrices are multiplied (Liu et al., arXiv 2205.05638)."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.peft import keys
from jaxllm.peft.base import ADAPTERS, METHODS, PeftConfig
from jaxllm.peft.files import PREFIX, AdapterFiles, Part
from jaxllm.peft.layer_sampling import LayerDraws
from jaxllm.peft.modules import Module
from jaxllm.peft.targets import Targets, check_each, check_expression, chosen_names, shown


class Ia3(PeftConfig):
    """Vectors beside the matrices of the layers. Names and meanings are those of HF PEFT's IA3Config."""

    type: Literal["ia3"]
    target_modules: str | tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """the matrices that get them: all-linear (all of the layers), a list of names such as [k_proj, v_proj], or a
    regular expression of the whole name"""
    modules_to_save: keys.ModulesToSave = ()
    save_embedding_layers: keys.SaveEmbeddingLayers = False
    lisa: keys.Lisa = None
    feedforward_modules: str | tuple[str, ...] = Field(default=("down_proj",))
    """those of them whose input is multiplied, in place of their output: names, or a regular expression"""

    files: ClassVar[AdapterFiles] = AdapterFiles(
        "IA3", described=("target_modules", "feedforward_modules", "modules_to_save"), inert=("init_ia3_weights",)
    )

    @property
    def targets(self) -> Targets:
        return Targets(self.type, self.target_modules, self.modules_to_save, self.save_embedding_layers)

    @property
    def draws(self) -> LayerDraws | None:
        return self.lisa

    @model_validator(mode="after")
    def _feedforward_is_targeted(self) -> "Ia3":
        check_expression("feedforward_modules", self.feedforward_modules)
        if isinstance(self.feedforward_modules, tuple) and isinstance(self.target_modules, tuple):
            others = [one for one in self.feedforward_modules if one not in self.target_modules]
            if others:
                raise ValueError(
                    f"feedforward_modules has {others[0]!r}, which target_modules has not; add it there, or remove it"
                )
        return self

    def leaves(self, lm: LM) -> Mapping[str, ExtraLeaf]:
        extra: dict[str, ExtraLeaf] = {}
        for module, layers in self.targets.matrices(lm):
            kernel = tree.at(lm.abstract(), module.path)
            axes = tree.at(lm.axes(), module.path)
            dtype, on_input = at_least_float32(kernel.dtype), self._on_input(module, layers)
            size, axis = (kernel.shape[1], axes[1]) if on_input else (kernel.shape[2], axes[2])

            def ones(*_: Any, shape: tuple[int, int] = (len(layers), size), dtype: Any = dtype) -> Any:
                return jnp.ones(shape, dtype)

            extra[_path(module, on_input)] = ExtraLeaf((axes[0], axis), ones)
            if not all(layers):

                def on(*_: Any, layers: tuple[bool, ...] = layers) -> Any:
                    return jnp.array(layers, jnp.float32)

                extra[f"{module.folder}/ia3_on"] = ExtraLeaf((axes[0],), on, frozen=True)
        return extra

    def parts(self, lm: LM, described: Mapping[str, Any]) -> list[Part]:
        shapes, found = tree.flatten(lm.abstract()), list[Part]()
        for module, layers in self.targets.matrices(lm):
            on_input = self._on_input(module, layers)
            path = _path(module, on_input)
            size = shapes[path].shape[1]
            order = None if on_input else module.operation.order
            for i, name in enumerate(module.names):
                if layers[i]:
                    shape = (1, size) if on_input else (size, 1)
                    found.append(Part(path, (i,), f"{PREFIX}{name}.ia3_l", shape, order=order))
        return found

    def computes(self, lm: LM) -> Any:
        own = self.targets.own_weights(lm)
        targets = [(*target, self._on_input(*target)) for target in self.targets.matrices(lm)]
        return targets, own.trained, own.untrained

    def _on_input(self, module: Module, layers: tuple[bool, ...]) -> bool:
        """Whether the inputs of the matrix are multiplied. Raises UserError if some layers' are and others' not."""
        names = [name for name, chosen in zip(module.names, layers, strict=True) if chosen]
        chosen = chosen_names("feedforward_modules", self.feedforward_modules, names)
        found = {name in chosen for name in names}
        if len(found) > 1:
            raise UserError(
                f"peft.feedforward_modules {shown(self.feedforward_modules)} means {module.short} in some of its "
                "layers only, which is not implemented; let it mean all of them, or none"
            )
        return found.pop()

    def description(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
        if isinstance(self.feedforward_modules, tuple):
            targets = self.targets.matrices(lm)
            names = {name: module.short for module, _ in targets for name in module.names}
            check_each("feedforward_modules", self.feedforward_modules, names, set(names.values()))
        return super().description(lm, leaves)


def _path(module: Module, on_input: bool) -> str:
    return f"{module.folder}/{'ia3_in' if on_input else 'ia3_out'}"


METHODS.add("ia3", Ia3)
ADAPTERS.add("IA3", Ia3)
