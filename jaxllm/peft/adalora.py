"""AdaLoRA (Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512).

Beside a matrix `[in, out]` of each of L layers stand r triplets of a right and a left singular vector and the value
between them: `lora_a` `[L, in, r]`, `lora_b` `[L, r, out]`, `lora_e` `[L, r]`, and `lora_scale` `[L]`. The values of
those that are worth least are set to 0 in training (`peft/reallocation.py`): the rank that is left goes where it is
needed.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from jaxllm.core import tree
from jaxllm.core.config import Conflict
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.peft import keys
from jaxllm.peft.base import ADAPTERS, METHODS, PeftConfig
from jaxllm.peft.files import PREFIX, AdapterFiles, Part
from jaxllm.peft.layer_sampling import LayerDraws
from jaxllm.peft.modules import Module
from jaxllm.peft.reallocation import reallocating
from jaxllm.peft.sections import OptimSection, TrainSection
from jaxllm.peft.targets import Targets

STDDEV = 0.02  # of the singular vectors at the start, as in HF PEFT


# The keys of how triplets are taken away, which change nothing of a finished adapter.
SCHEDULE = ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight")


class Allocation(BaseModel):
    """What training has left of the triplets, as the files say."""

    model_config = ConfigDict(strict=True)

    init_r: int = 12
    rank_pattern: dict[str, list[bool]] = Field(default_factory=dict)
    """which triplets are left of each matrix; of others, all"""

    @model_validator(mode="after")
    def _patterns_fit(self) -> "Allocation":
        for name, kept in self.rank_pattern.items():
            if len(kept) != self.init_r:
                raise ValueError(f"rank_pattern has {len(kept)} entries for {name}, and init_r is {self.init_r}")
        return self


class AdaLora(PeftConfig):
    """Triplets beside the matrices of the layers, fewer and fewer of them. Names and meanings are those of HF PEFT's
    AdaLoraConfig; its total_step is the number of the run's steps."""

    type: Literal["adalora"]
    target_modules: keys.TargetModules = keys.ALL_LINEAR
    modules_to_save: keys.ModulesToSave = ()
    save_embedding_layers: keys.SaveEmbeddingLayers = False
    lisa: keys.Lisa = None
    lora_dropout: keys.LoraDropout = 0.0
    layers_to_transform: keys.LayersToTransform = None
    bias: keys.TrainedBiases = "none"
    init_r: keys.Rank = 12
    """triplets of each matrix at the start"""
    target_r: keys.Rank = 8
    """triplets that are left in the end, on average over the matrices; below init_r"""
    tinit: NonNegativeInt = 0
    """steps before the first are taken away"""
    tfinal: NonNegativeInt = 0
    """steps at the end in which the same ones stay"""
    deltaT: PositiveInt = 1
    """steps after which it is decided anew which ones stay"""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    """decay of the average of what a parameter matters, |parameter · gradient|"""
    beta2: float = Field(default=0.85, gt=0, lt=1)
    """decay of the average of how far that is from its average"""
    orth_reg_weight: float = Field(default=0.5, ge=0, allow_inf_nan=False)
    """weight in what is minimised of how far the singular vectors are from orthonormal ones"""
    lora_alpha: keys.Positive = 8.0
    """what they add is multiplied by lora_alpha / init_r"""

    compares_layers: ClassVar[bool] = True
    follows_length: ClassVar[str] = "the budget of adalora"
    files: ClassVar[AdapterFiles] = AdapterFiles(
        "ADALORA",
        described=(
            *("init_r", "lora_alpha", "bias", "target_modules", "layers_to_transform", "modules_to_save"),
            "rank_pattern",
        ),
        of_files=Allocation,
        inert=(
            *(*SCHEDULE, "total_step", "ensure_weight_tying", "init_lora_weights", "layers_pattern", "lora_dropout"),
            *("megatron_core", "qalora_group_size"),
            *("r", "use_rslora", "alpha_pattern"),  # of LoRA, which HF PEFT's AdaLoRA does not look at
        ),
    )

    @property
    def targets(self) -> Targets:
        saved = self.modules_to_save, self.save_embedding_layers
        return Targets(self.type, self.target_modules, *saved, self.layers_to_transform, self.bias)

    @property
    def draws(self) -> LayerDraws | None:
        return self.lisa

    def conflicts(self, optim: OptimSection, train: TrainSection) -> Iterator[Conflict]:
        if train.update == "fused":
            yield Conflict(
                "peft.type is adalora, which compares what it has in all layers, and train.update is fused, which "
                "updates one layer at a time",
                "set update to ordinary (the gradients of the triplets are small), or choose another method, such as "
                "lora",
            )
        if optim.averages:
            yield Conflict(
                f"peft.type is adalora, which sets values to 0, and optim.type {optim.type} evaluates an average that "
                "would keep them",
                "choose another optimizer, such as adamw",
            )
        if self.lisa is not None:
            yield Conflict(
                "peft.type is adalora, which compares what it has in all layers after each update, and peft.lisa "
                "trains a few at a time",
                "remove lisa, or choose another method, such as lora",
            )
        yield from super().conflicts(optim, train)

    def leaves(self, lm: LM) -> Mapping[str, ExtraLeaf]:
        found = dict[str, ExtraLeaf]()
        for module, layers in self.targets.matrices(lm):
            found |= self._leaves_beside(lm, module, layers)
        return found

    def settings(self) -> Mapping[str, Any]:
        return {"adapter_dropout": self.lora_dropout}

    def _leaves_beside(self, lm: LM, module: Module, layers: tuple[bool, ...]) -> dict[str, ExtraLeaf]:
        kernel = tree.at(lm.abstract(), module.path)
        (count, width, out), dtype, r = kernel.shape, at_least_float32(kernel.dtype), self.init_r
        of_layers, of_input, of_output = tree.at(lm.axes(), module.path)
        chosen = jnp.array(layers)

        def normal(*shape: int) -> Callable[[jax.Array, Params], jax.Array]:
            def draw(key: jax.Array, _: Params) -> jax.Array:
                return jnp.where(chosen[:, None, None], STDDEV * jax.random.normal(key, shape, dtype), 0)

            return draw

        leaves = {
            "lora_a": ExtraLeaf((of_layers, of_input, "rank"), normal(count, width, r)),
            "lora_b": ExtraLeaf((of_layers, "rank", of_output), normal(count, r, out)),
            "lora_e": ExtraLeaf((of_layers, "rank"), lambda *_: jnp.zeros((count, r), dtype)),
            "lora_scale": ExtraLeaf((of_layers,), lambda *_: jnp.where(chosen, self._scale, 0).astype(dtype), True),
        }
        return {f"{module.folder}/{name}": leaf for name, leaf in leaves.items()}

    @property
    def _scale(self) -> float:
        return self.lora_alpha / (self.init_r + 1e-5)  # the addend is HF PEFT's

    def budgets(self, lm: LM, steps: int) -> np.ndarray:
        """How many triplets all matrices together keep after each of the steps 0, 1, … until none are taken away any
        more (equation 12 of the paper): `[steps − tfinal + 1]` int32.

        Raises UserError for a run that is too short, and where there is nothing to take away.
        """
        if self.target_r >= self.init_r:
            raise UserError(
                f"peft.target_r is {self.target_r} and peft.init_r is {self.init_r}, which leaves nothing to take "
                "away; set init_r to 1.5 times target_r, or use type: lora"
            )
        last = steps - self.tfinal
        if self.tinit >= last:
            raise UserError(
                f"peft.tinit {self.tinit} and peft.tfinal {self.tfinal} leave none of the run's {steps} steps to take "
                "triplets away in; lower them, or raise train.steps"
            )
        matrices = sum(sum(layers) for _, layers in self.targets.matrices(lm))
        first, least = self.init_r * matrices, self.target_r * matrices

        def at(step: int) -> int:
            left = 1 - (step - self.tinit) / (last - self.tinit)
            return first if step <= self.tinit else int((first - least) * left**3 + least)

        return np.array([at(step) for step in range(last + 1)], np.int32)

    def transform(
        self, tx: optax.GradientTransformationExtraArgs, lm: LM, steps: int
    ) -> optax.GradientTransformationExtraArgs:
        places = {
            module.folder: np.flatnonzero(np.array(layers)[lm.layer_order])
            for module, layers in self.targets.matrices(lm)
        }
        decays = self.beta1, self.beta2
        return reallocating(tx, self.budgets(lm, steps), places, begin=self.tinit, every=self.deltaT, decays=decays)

    def penalty(self, lm: LM) -> Callable[[Params], jax.Array] | None:
        """orth_reg_weight times the mean of ‖PᵀP − I‖ over both matrices P of vectors beside each matrix (equation 4,
        whose norm is squared; HF PEFT's is not). Triplets that an adapter has lost before do not count."""
        if not self.orth_reg_weight:
            return None
        targets = self.targets.matrices(lm)
        count = 2 * sum(sum(layers) for _, layers in targets)

        def penalty(params: Params) -> jax.Array:
            norms = list[jax.Array]()
            for module, _ in targets:
                beside = tree.at(params, module.folder)
                for products in ("lir,lis->lrs", beside["lora_a"]), ("lro,lso->lrs", beside["lora_b"]):
                    form, vectors = products
                    gram = jnp.einsum(form, vectors, vectors)
                    there = jnp.diagonal(gram, axis1=1, axis2=2) > 0
                    off = gram - jnp.eye(self.init_r, dtype=gram.dtype) * there[:, None]
                    square = jnp.sum(jnp.square(off), axis=(1, 2))
                    # The root has no gradient at 0, where layers without triplets are.
                    norms.append(jnp.sum(jnp.sqrt(jnp.where(square > 0, square, 1)) * (square > 0)))
            return self.orth_reg_weight * sum(norms[1:], norms[0]) / count

        return penalty

    # The files

    def computes(self, lm: LM) -> Any:
        own = self.targets.own_weights(lm)
        return self.targets.matrices(lm), self._scale, self.init_r, own.trained, own.untrained

    def description(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return {
            **super().description(lm, leaves),
            "lora_dropout": self.lora_dropout,
            "ensure_weight_tying": self.targets.changes_tied(lm),
            **self.model_dump(mode="json", include={*SCHEDULE}),
            # HF PEFT wants the phases to fit into one; a finished adapter has none.
            "total_step": self.tinit + self.tfinal + 1,
            "rank_pattern": {
                _pattern_name(name): (leaves[f"{module.folder}/lora_e"][i] != 0).tolist()
                for module, layers in self.targets.matrices(lm)
                for i, name in enumerate(module.names)
                if layers[i]
            },
        }

    def parts(self, lm: LM, described: Mapping[str, Any]) -> list[Part]:
        found, left = list[Part](), described.get("rank_pattern") or {}
        for module, layers in self.targets.matrices(lm):
            _, width, out = tree.at(lm.abstract(), module.path).shape
            of_output = module.operation.order
            for i, name in enumerate(module.names):
                if not layers[i]:
                    continue
                kept, whole = np.flatnonzero(left.get(_pattern_name(name), [True] * self.init_r)), slice(None)
                for leaf, place, end, shape, turned, order in (
                    # An index array puts its axis in front of that of a slice before it.
                    ("lora_a", (i, whole, kept), "lora_A", (len(kept), width), False, None),
                    ("lora_b", (i, kept), "lora_B", (out, len(kept)), True, of_output),
                    ("lora_e", (i, kept), "lora_E", (len(kept), 1), False, None),
                ):
                    path, tensor = f"{module.folder}/{leaf}", f"{PREFIX}{name}.{end}"
                    found.append(Part(path, place, tensor, shape, turned, order))
        return found


def _pattern_name(module: str) -> str:
    return f"{module}.lora_E"


METHODS.add("adalora", AdaLora)
ADAPTERS.add("ADALORA", AdaLora)
