"""AdaLoRA (Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512).

Beside a matrix `[in, out]` of each of L layers stand r triplets of a right and a left singular vector and the value
between them: `lora_a` `[L, in, r]`, `lora_b` `[L, r, out]`, `lora_e` `[L, r]`, and `lora_scale` `[L]`. The values of
those that are worth least are set to 0 in training (`peft/reallocation.py`): the rank that is left goes where it is
needed.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from jaxllm.core import tree
from jaxllm.core.config import Conflict
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.peft.base import METHODS
from jaxllm.peft.files import ADAPTERS, PREFIX, AdapterConfig, Part
from jaxllm.peft.low_rank import LowRank, Positive, Rank
from jaxllm.peft.modules import Module
from jaxllm.peft.reallocation import reallocating
from jaxllm.peft.sections import OptimSection, TrainSection

STDDEV = 0.02  # of the singular vectors at the start, as in HF PEFT


class AdaLora(LowRank):
    """Triplets beside the matrices of the layers, fewer and fewer of them. Names and meanings are those of HF PEFT's
    AdaLoraConfig; its total_step is the number of the run's steps."""

    type: Literal["adalora"]
    init_r: Rank = 12
    """triplets of each matrix at the start"""
    target_r: Rank = 8
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
    lora_alpha: Positive = 8.0
    """what they add is multiplied by lora_alpha / init_r"""

    compares_layers: ClassVar[bool] = True
    follows_length: ClassVar[str] = "the budget of adalora"
    peft_type: ClassVar[str] = "ADALORA"
    described: ClassVar[tuple[str, ...]] = (
        *("init_r", "lora_alpha", "bias", "target_modules", "layers_to_transform", "modules_to_save"),
    )
    schedule: ClassVar[tuple[str, ...]] = (
        *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"),
    )
    inert: ClassVar[tuple[str, ...]] = (
        *(*schedule, "total_step", "ensure_weight_tying", "init_lora_weights", "layers_pattern", "lora_dropout"),
        *("megatron_core", "qalora_group_size"),
        *("r", "use_rslora", "alpha_pattern"),  # of LoRA, which HF PEFT's AdaLoRA does not look at
    )

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

    def add(self, lm: LM) -> LM:
        extra = dict[str, ExtraLeaf]()
        for module, layers in self.target_layers(lm):
            extra |= self._leaves_beside(lm, module, layers)
        return replace(lm, extra={**lm.extra, **extra}, adapter_dropout=self.lora_dropout)

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
        matrices = sum(sum(layers) for _, layers in self.target_layers(lm))
        first, least = self.init_r * matrices, self.target_r * matrices

        def at(step: int) -> int:
            left = 1 - (step - self.tinit) / (last - self.tinit)
            return first if step <= self.tinit else int((first - least) * left**3 + least)

        return np.array([at(step) for step in range(last + 1)], np.int32)

    def transform(
        self, tx: optax.GradientTransformationExtraArgs, lm: LM, steps: int
    ) -> optax.GradientTransformationExtraArgs:
        places = {
            module.folder: np.flatnonzero(np.array(layers)[lm.layer_order]) for module, layers in self.target_layers(lm)
        }
        decays = self.beta1, self.beta2
        return reallocating(tx, self.budgets(lm, steps), places, begin=self.tinit, every=self.deltaT, decays=decays)

    def penalty(self, lm: LM) -> Callable[[Params], jax.Array] | None:
        """orth_reg_weight times the mean of ‖PᵀP − I‖ over both matrices P of vectors beside each matrix (equation 4,
        whose norm is squared; HF PEFT's is not). Triplets that an adapter has lost before do not count."""
        if not self.orth_reg_weight:
            return None
        targets = self.target_layers(lm)
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

    # Files

    def kept(self, name: str) -> np.ndarray:
        """Which triplets of the matrix `name` the files have."""
        del name
        return np.arange(self.init_r)

    def parts(self, lm: LM) -> list[Part]:
        found = list[Part]()
        for module, layers in self.target_layers(lm):
            _, width, out = tree.at(lm.abstract(), module.path).shape
            of_output = module.operation.order
            for i, name in enumerate(module.names):
                if not layers[i]:
                    continue
                kept, whole = self.kept(name), slice(None)
                for leaf, place, end, shape, turned, order in (
                    # An index array puts its axis in front of that of a slice before it.
                    ("lora_a", (i, whole, kept), "lora_A", (len(kept), width), False, None),
                    ("lora_b", (i, kept), "lora_B", (out, len(kept)), True, of_output),
                    ("lora_e", (i, kept), "lora_E", (len(kept), 1), False, None),
                ):
                    path, tensor = f"{module.folder}/{leaf}", f"{PREFIX}{name}.{end}"
                    found.append(Part(path, place, tensor, shape, turned, order))
        return found

    def computes(self, lm: LM) -> Any:
        return self.target_layers(lm), self._scale, self.init_r, self.whole(lm), self.held(lm)

    def finished(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> AdapterConfig:
        left = {
            _pattern_name(name): (leaves[f"{module.folder}/lora_e"][i] != 0).tolist()
            for module, layers in self.target_layers(lm)
            for i, name in enumerate(module.names)
            if layers[i]
        }
        return AllocatedAdaLora(**self.model_dump(exclude={"rank_pattern"}), rank_pattern=left)

    def description(self, lm: LM) -> dict[str, Any]:
        return {
            **super().description(lm),
            **self.model_dump(mode="json", include={*self.schedule}),
            # HF PEFT wants the phases to fit into one; a finished adapter has none.
            "total_step": self.tinit + self.tfinal + 1,
        }


class AllocatedAdaLora(AdaLora):
    """What training has left of it, as the files say."""

    rank_pattern: dict[str, list[bool]] = Field(default_factory=dict, exclude=True)
    """which triplets are left of each matrix; of others, all"""

    described: ClassVar[tuple[str, ...]] = (*AdaLora.described, "rank_pattern")

    @model_validator(mode="after")
    def _patterns_fit(self) -> "AllocatedAdaLora":
        for name, kept in self.rank_pattern.items():
            if len(kept) != self.init_r:
                raise ValueError(f"rank_pattern has {len(kept)} entries for {name}, and init_r is {self.init_r}")
        return self

    def kept(self, name: str) -> np.ndarray:
        pattern = self.rank_pattern.get(_pattern_name(name))
        return super().kept(name) if pattern is None else np.flatnonzero(pattern)

    def description(self, lm: LM) -> dict[str, Any]:
        return {**super().description(lm), "rank_pattern": self.rank_pattern}


def _pattern_name(module: str) -> str:
    return f"{module}.lora_E"


METHODS.add("adalora", AdaLora)
ADAPTERS.add("ADALORA", AllocatedAdaLora)
