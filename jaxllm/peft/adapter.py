"""An adapter that HF PEFT, or a run, has written: `adapter_config.json` and `adapter_model.safetensors`."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.hf.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, DTYPES, open_weights
from jaxllm.hf.weights import Entry, weight_table
from jaxllm.models.lm import LM
from jaxllm.peft.adapter_config import read_adapter_config
from jaxllm.peft.base import PeftConfig
from jaxllm.peft.files import EXPORTED_TO, PREFIX, read_parts
from jaxllm.peft.merge import merge


@dataclass(frozen=True)
class Adapter:
    """An adapter in `folder`, of `method`. described: adapter_config.json. tensors: by their names."""

    folder: Path
    method: PeftConfig
    described: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]

    @property
    def ties(self) -> bool:
        """Whether a head that is the embedding stays that where the adapter changes it."""
        return bool(self.described.get("ensure_weight_tying"))

    def check_same(self, method: PeftConfig, lm: LM) -> None:
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
        file = self.folder / ADAPTER_CONFIG
        try:
            lm = self.method.add(lm)
            own = self.method.own_weights(lm)
        except UserError as error:
            raise UserError(f"{file}, for this model: {error}") from error
        if own.changes_tied and not self.ties:
            raise UserError(
                f"{file}: changes the embedding without ensure_weight_tying, so that the model's head, which is the "
                "embedding, keeps the old one; that is not implemented. Train it with ensure_weight_tying=True, or "
                "from a model that is saved with tie_word_embeddings false and a lm_head.weight of its own"
            )
        shapes, left = tree.flatten(lm.abstract()), dict(self.tensors)
        try:
            parts = self.method.parts(lm, self.described)
            found = read_parts(parts, lm, lambda name, shape: _take(name, shape, left))
            for entry in weight_table(lm):
                names = [PREFIX + name for name in entry.names]
                if entry.path in own.untrained:  # of which HF PEFT writes those that it has changed
                    names = [name for name in names if name in left]
                elif entry.path not in own.trained:
                    continue
                if names:
                    stack = found.setdefault(entry.path, np.zeros(shapes[entry.path].shape, shapes[entry.path].dtype))
                    value = entry.rule.operation.read(_take_one(names, entry, left))
                    out = stack if entry.layer is None else stack[entry.layer]
                    out[tuple(slice(size) for size in value.shape)] = value
            if left:
                raise UserError(
                    f"holds {len(left)} tensors that {ADAPTER_CONFIG} does not ask for of this model, first "
                    f"{next(iter(left))!r}; take the base model that the adapter was made for"
                )
        except UserError as error:
            raise UserError(f"{self.folder / ADAPTER_WEIGHTS}: {error}") from error
        fixed = {path: leaf.draw(jax.random.key(0), {}) for path, leaf in lm.extra.items() if path not in found}
        return {path: jax.device_put(leaf, shapes[path].sharding) for path, leaf in {**found, **fixed}.items()}


def _take(name: str, shape: tuple[int, ...], left: dict[str, np.ndarray]) -> np.ndarray:
    tensor = left.pop(name, None)
    if tensor is None:
        raise UserError(f"lacks {name}, which {ADAPTER_CONFIG} asks for of this model")
    if tensor.shape != shape:
        raise UserError(
            f"{name} has the shape {[*tensor.shape]}, and for this model it is {[*shape]}; take the base model that "
            "the adapter was made for"
        )
    if tensor.dtype not in DTYPES.values():
        raise UserError(f"{name} is {tensor.dtype}, and the weights of an adapter must be {', '.join(DTYPES)}")
    return tensor


def _take_one(names: Sequence[str], entry: Entry, left: dict[str, np.ndarray]) -> np.ndarray:
    """The parameter's tensor, which each of `names` is."""
    tensor = left.get(names[0])
    if entry.rule.vocab_axis is not None and tensor is not None and tensor.shape[1:] == entry.shape[1:]:
        rows, of_model = len(tensor), entry.shape[0]
        if rows != of_model:
            raise UserError(
                f"{names[0]} has {rows} rows, and the model's vocabulary {of_model}: it was resized before the adapter "
                f"was trained. Resize the model too, in transformers by model.resize_token_embeddings({rows}), save it "
                "with the adapter's tokenizer, and give that folder as the model"
            )
    tensor, *others = (_take(name, entry.shape, left) for name in names)
    if any(not np.array_equal(tensor, other) for other in others):
        raise UserError(f"{' and '.join(names)} differ, and are one in the model")
    return tensor


def with_adapter(
    folder: str | Path, lm: LM, load: Callable[[], Params], method: PeftConfig | None = None
) -> Callable[[], Params]:
    """What loads the parameters of `lm` by `load` with the adapter in `folder`: beside them, if `method` trains it on,
    else merged into them.

    Raises UserError, before anything is loaded, for an adapter of another model, or another one than `method`'s.
    """
    adapter = read_adapter(folder)
    going_on = method if method is not None and method.files is not None else None
    if going_on is None and not adapter.method.merges:
        raise UserError(
            f"{adapter.folder}: its virtual tokens cannot be merged into the weights of a model; give it a peft "
            f"section, {{type: {adapter.method.type}, num_virtual_tokens: …}}, to train it on"
        )
    leaves = adapter.leaves(lm)
    if going_on is not None:
        adapter.check_same(going_on, lm)

    def loaded() -> Params:
        params = tree.insert(load(), leaves)
        return merge(params) if going_on is None else params

    return loaded


def read_adapter(folder: str | Path) -> Adapter:
    """The adapter in a folder that HF PEFT wrote, or that a run wrote, or in a run's own.

    Raises UserError for a folder that holds none, and for settings that are not implemented.
    """
    folder = Path(folder)
    if (folder / EXPORTED_TO / ADAPTER_CONFIG).is_file():
        folder /= EXPORTED_TO
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        named = ", ".join(sorted(str(inner.parent) for inner in folder.glob(f"*/{ADAPTER_CONFIG}")))
        remedy = f"it has those of {named}" if named else "give the folder of an adapter, such as <run>/export/adapter"
        raise UserError(f"{folder}: has no {ADAPTER_CONFIG}; {remedy}")
    (method, described), tensors = read_adapter_config(file), _read_tensors(folder)
    if method.targets is not None:
        method = method.model_copy(update={"save_embedding_layers": method.targets.holds_embeddings(tensors)})
    return Adapter(folder, method, described, tensors)


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder}: its weights are a pickle, adapter_model.bin, which is not read; save safetensors")
    with open_weights(file) as weights:
        names = sorted(weights.keys())
        tensors = {name: weights.get_tensor(name) for name in names}
    tensors = {re.sub(r"(\.token_adapter)?\.base_layer(?=\.(bias|weight)$)", "", name): tensors[name] for name in names}
    # Where the embeddings are asked for too, HF PEFT also writes what a module of modules_to_save was before, and the
    # rows of tokens a second time, beside the head that reads them too.
    again = {name: re.sub(r"\.(original_module|modules_to_save)(?=\.\w+$)", "", name) for name in tensors}
    tensors = {name: tensor for name, tensor in tensors.items() if again[name] == name or again[name] not in tensors}
    rows = [name for name in tensors if name.endswith(".token_adapter.trainable_tokens_delta")]
    if len(rows) == 2 and np.array_equal(*(tensors[name] for name in rows)):
        tensors.pop(f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta", None)
    return tensors
