"""The files of HF PEFT that an adapter is stored in: which tensor is which part of its leaves."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from pydantic import BaseModel

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.hf.export import gather, replacing, write_json, write_tensors
from jaxllm.hf.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jaxllm.hf.weights import weight_table
from jaxllm.models.lm import LM

# Where a run's adapter is in its folder.
EXPORTED_TO = "export/adapter"

# What HF PEFT puts before a module's name.
PREFIX = "base_model.model."

Take = Callable[[str, tuple[int, ...]], np.ndarray]
"""The tensor of a name, which must have the shape."""


@dataclass(frozen=True)
class AdapterFiles:
    """How adapter_config.json describes an adapter.

    peft_type: what HF PEFT calls the method. described: the fields that say what the adapter computes; those that the
    method's section has too are its settings. in_order: those of them that are lists whose order matters. inert: the
    fields that change nothing of what a finished adapter computes. of_files: checks fields of `described` that the
    section does not have.
    """

    peft_type: str
    described: tuple[str, ...]
    inert: tuple[str, ...] = ()
    in_order: tuple[str, ...] = ()
    of_files: type[BaseModel] | None = None


@dataclass(frozen=True)
class Part:
    """A part of the leaf at `path`, and the tensor `name` of `shape` in the file that has it.

    place: of the part in the leaf. within: its place in the tensor; by default the part is the whole tensor. turned:
    whether the file has the matrix the other way round. order: of which place in the file each entry of the part's last
    axis is; None: of its own.
    """

    path: str
    place: tuple[int | slice | np.ndarray, ...]
    name: str
    shape: tuple[int, ...]
    turned: bool = False
    order: np.ndarray | None = None
    within: tuple[slice, ...] | EllipsisType = ...

    def read(self, tensor: np.ndarray, leaf: np.ndarray) -> None:
        """Writes what the file's tensor has of it into the leaf."""
        stored = tensor[self.within]
        part = (stored.T if self.turned else stored).reshape(leaf[self.place].shape)
        leaf[self.place] = part if self.order is None else part[..., self.order]

    def write(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Writes it into the file's tensor."""
        part = leaf[self.place]
        if self.order is not None:
            part = part[..., np.argsort(self.order)]
        tensor[self.within] = (part.T if self.turned else part).reshape(tensor[self.within].shape)


def write_parts(parts: Iterable[Part], leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of the files, of the leaves by their paths."""
    tensors = dict[str, np.ndarray]()
    for part in parts:
        leaf = leaves[part.path]
        part.write(leaf, tensors.setdefault(part.name, np.zeros(part.shape, leaf.dtype)))
    return tensors


def read_parts(parts: Iterable[Part], lm: LM, take: Take) -> dict[str, np.ndarray]:
    """The leaves that the files hold of `lm`, by their paths. Raises UserError as `take` does.

    Two parts that are the same part of a leaf must be equal.
    """
    shapes, leaves = tree.flatten(lm.abstract()), dict[str, np.ndarray]()
    taken, twins = dict[str, np.ndarray](), dict[tuple[str, str], Part]()
    for part in parts:
        if part.name not in taken:
            taken[part.name] = take(part.name, part.shape)
        shape, tensor = shapes[part.path], taken[part.name]
        leaf = leaves.setdefault(part.path, np.zeros(shape.shape, shape.dtype))
        twin = twins.setdefault((part.path, str(part.place)), part)
        if twin is not part:
            (same,) = write_parts([part], leaves).values()
            if not np.array_equal(same[part.within], tensor[part.within].astype(leaf.dtype)):
                raise UserError(f"{part.name} and {twin.name} differ, and are one where the head is the embedding")
        part.read(tensor, leaf)
    return leaves


@dataclass(frozen=True)
class OwnWeights:
    """The model's own parameters that are in the files of an adapter, by their paths.

    trained: which train. untrained: which do not, and are there all the same. wrapped: by the names of the modules that
    have an adapter, what HF PEFT puts between such a name and `.weight`. changes_tied: whether the adapter changes an
    embedding that is the head too.
    """

    trained: frozenset[str] = frozenset()
    untrained: frozenset[str] = frozenset()
    wrapped: Mapping[str, str] = field(default_factory=dict)
    changes_tied: bool = False

    def tensors(self, lm: LM, leaves: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        """The tensors of the files that have them. A collective operation of all processes."""
        found = dict[str, np.ndarray]()
        for entry in weight_table(lm):
            if entry.path in self.trained | self.untrained:
                tensor = gather(lm, leaves[entry.path], entry)
                for name in entry.names:
                    module, _, kind = name.rpartition(".")
                    found[f"{PREFIX}{module}{self.wrapped.get(module, '')}.{kind}"] = tensor
        return found


def write_adapter(folder: Path, tensors: dict[str, np.ndarray], content: Mapping[str, Any]) -> None:
    """Writes the two files of an adapter; an older one in `folder` is replaced. Every process must call it."""
    with replacing(folder.absolute(), sum(tensor.nbytes for tensor in tensors.values())) as new:
        write_tensors(tensors, new / ADAPTER_WEIGHTS)
        if jax.process_index() == 0:
            write_json(new / ADAPTER_CONFIG, dict(content))


def on_host(lm: LM, leaf: jax.Array) -> np.ndarray:
    """The whole of a leaf. A collective operation of all processes."""
    return np.asarray(jax.device_put(leaf, lm.layout.replicated).addressable_data(0))
