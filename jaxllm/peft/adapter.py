"""An adapter that HF PEFT, or a run, has written: `adapter_config.json` and `adapter_model.safetensors`."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.hf.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, open_weights
from jaxllm.hf.weights import weight_table
from jaxllm.models.base import LM
from jaxllm.peft.adapter_config import read_adapter_config
from jaxllm.peft.base import PeftConfig
from jaxllm.peft.files import PREFIX, AdapterConfig, StoredAdapter
from jaxllm.peft.merge import merge


@dataclass(frozen=True)
class Adapter:
    """An adapter in `folder`.

    ties: whether a head that is the embedding stays that where the embedding trains. tensors: by their names.
    """

    folder: Path
    method: StoredAdapter
    ties: bool
    tensors: Mapping[str, np.ndarray]

    def check_same(self, method: AdapterConfig, lm: LM) -> None:
        """Raises UserError unless `method` describes this adapter of `lm`."""
        if method.type != self.method.type or method.computes(lm) != self.method.computes(lm):
            section = self.method.model_dump(mode="json", exclude_defaults=True)
            raise UserError(
                f"model.adapter {self.folder} is another adapter than the peft section describes; it is "
                f"{', '.join(f'{name}: {value}' for name, value in section.items())}. Write that as the section, or "
                "remove the section to merge the adapter and train the whole model"
            )

    def leaves(self, lm: LM) -> dict[str, jax.Array]:
        """By their paths, the leaves that the adapter adds to `lm` or replaces, laid out as there.

        Raises UserError for an adapter of another model.
        """
        try:
            lm, left = self.method.add(lm), dict(self.tensors)
            whole = self.method.whole(lm)
            saved = self.method.saved(lm)
        except UserError as error:
            raise UserError(f"{self.folder / ADAPTER_CONFIG}, for this model: {error}") from error
        if lm.config.tie_word_embeddings and "embed_tokens" in saved and not self.ties:
            raise UserError(
                f"{self.folder / ADAPTER_CONFIG}: modules_to_save has the embedding without ensure_weight_tying, so "
                "that the model's head keeps the old one, which is not implemented; train it with"
                " ensure_weight_tying=True"
            )
        shapes = tree.flatten(lm.abstract())
        found = self.method.leaves(lm, lambda name, shape: self._take(name, shape, left))
        for entry in weight_table(lm):
            if entry.path in whole:
                stack = found.setdefault(entry.path, np.zeros(shapes[entry.path].shape, shapes[entry.path].dtype))
                out = stack if entry.layer is None else stack[entry.layer]
                tensor, *others = (self._take(PREFIX + name, entry.shape, left) for name in entry.names)
                if any(not np.array_equal(tensor, other) for other in others):
                    raise UserError(
                        f"{self.folder / ADAPTER_WEIGHTS}: {' and '.join(entry.names)} differ, and are one in the model"
                    )
                value = entry.rule.operation.read(tensor)
                out[tuple(slice(size) for size in value.shape)] = value
        if left:
            raise UserError(
                f"{self.folder / ADAPTER_WEIGHTS}: holds {len(left)} tensors that {ADAPTER_CONFIG} does not ask for of "
                f"this model, first {next(iter(left))!r}; take the base model that the adapter was made for"
            )
        fixed = {path: leaf.draw(jax.random.key(0), {}) for path, leaf in lm.extra.items() if path not in found}
        return {path: jax.device_put(leaf, shapes[path].sharding) for path, leaf in {**found, **fixed}.items()}

    def _take(self, name: str, shape: tuple[int, ...], left: dict[str, np.ndarray]) -> np.ndarray:
        tensor = left.pop(name, None)
        file = self.folder / ADAPTER_WEIGHTS
        if tensor is None:
            raise UserError(f"{file}: lacks {name}, which {ADAPTER_CONFIG} asks for of this model")
        if tensor.shape != shape:
            raise UserError(
                f"{file}: {name} has the shape {[*tensor.shape]}, and for this model it is {[*shape]}; take "
                "the base model that the adapter was made for"
            )
        return tensor


def with_adapter(
    folder: str | Path, lm: LM, load: Callable[[], Params], method: PeftConfig | None = None
) -> Callable[[], Params]:
    """What loads the parameters of `lm` by `load` with the adapter in `folder`: beside them, if `method` trains it on,
    else merged into them.

    Raises UserError, before anything is loaded, for an adapter of another model, or another one than `method`'s.
    """
    adapter = read_adapter(folder)
    goes_on = isinstance(method, AdapterConfig)
    if not goes_on and not adapter.method.merges:
        raise UserError(
            f"{adapter.folder}: its virtual tokens cannot be merged into the weights of a model; give it a peft "
            f"section, {{type: {adapter.method.type}, num_virtual_tokens: …}}, to train it on"
        )
    leaves = adapter.leaves(lm)
    if goes_on:
        adapter.check_same(method, lm)

    def loaded() -> Params:
        params = tree.insert(load(), leaves)
        return params if goes_on else merge(params)

    return loaded


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder that HF PEFT wrote, or that a run wrote, or in a run's own.

    Raises UserError for a folder that holds none, and for settings that are not implemented.
    """
    folder = Path(folder)
    if (folder / AdapterConfig.exported_to / ADAPTER_CONFIG).is_file():
        folder /= AdapterConfig.exported_to
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        named = ", ".join(sorted(str(inner.parent) for inner in folder.glob(f"*/{ADAPTER_CONFIG}")))
        remedy = f"it has those of {named}" if named else "give the folder of an adapter, such as <run>/export/adapter"
        raise UserError(f"{folder}: has no {ADAPTER_CONFIG}; {remedy}")
    method, ties = read_adapter_config(file)
    return Adapter(folder, method, ties, _read_tensors(folder))


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}: its weights are a pickle, adapter_model.bin, which is not read; save safetensors")
    with open_weights(file) as weights:
        names = sorted(weights.keys())
        tensors = {name: weights.get_tensor(name) for name in names}
    return {re.sub(r"\.base_layer(?=\.bias$)", "", name): tensors[name] for name in names}
