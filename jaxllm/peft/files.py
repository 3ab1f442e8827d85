"""Methods whose result is an adapter in the files of HF PEFT: which tensor is which part of their leaves."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, get_args

import jax
import numpy as np

from jaxllm.core import tree
from jaxllm.core.config import Conflict
from jaxllm.core.errors import UserError
from jaxllm.core.finite import check_finite
from jaxllm.core.registry import Registry
from jaxllm.core.tree import Params
from jaxllm.hf.export import gather, replacing, write_json, write_tensors
from jaxllm.hf.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jaxllm.hf.weights import weight_table
from jaxllm.models.lm import LM
from jaxllm.models.quantized import Quantization
from jaxllm.peft.base import PeftConfig

# What HF PEFT puts before a module's name.
PREFIX = "base_model.model."

Take = Callable[[str, tuple[int, ...]], np.ndarray]
"""The tensor of a name, which must have the shape."""


@dataclass(frozen=True)
class Part:
    """The tensor `name` of `shape` in the file: of the leaf at `path` the part at `place`.

    turned: whether the file has the matrix the other way round. order: of which place in the file each entry of the
    part's last axis is; None: of its own.
    """

    path: str
    place: tuple[int | slice | np.ndarray, ...]
    name: str
    shape: tuple[int, ...]
    turned: bool = False
    order: np.ndarray | None = None

    def read(self, tensor: np.ndarray, leaf: np.ndarray) -> None:
        """Writes the file's tensor into the leaf."""
        part = (tensor.T if self.turned else tensor).reshape(leaf[self.place].shape)
        leaf[self.place] = part if self.order is None else part[..., self.order]

    def write(self, leaf: np.ndarray) -> np.ndarray:
        """The file's tensor."""
        part = leaf[self.place]
        if self.order is not None:
            part = part[..., np.argsort(self.order)]
        return np.ascontiguousarray(part.T if self.turned else part).reshape(self.shape)


class AdapterConfig(PeftConfig):
    """What the methods have whose result is an adapter."""

    exported_to: ClassVar[str] = "export/adapter"
    exported_for: ClassVar[str] = "HF peft"

    peft_type: ClassVar[str]
    """What HF PEFT calls the method."""
    described: ClassVar[tuple[str, ...]]
    """The fields of adapter_config.json that say what an adapter computes, which are those of the section."""
    inert: ClassVar[tuple[str, ...]] = ()
    """The fields that change nothing of what a finished adapter computes."""

    @classmethod
    def section(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The section that describes the adapter of an adapter_config.json."""
        values = {name: raw[name] for name in cls.described if raw.get(name) is not None}
        values = {name: _as_tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return {"type": get_args(cls.model_fields["type"].annotation)[0], **values}

    @abstractmethod
    def computes(self, lm: LM) -> Any:
        """What two sections that describe the same adapter of `lm` have in common."""

    @abstractmethod
    def tensors(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of the files but those of `whole`, of the leaves that the method adds to `lm`, by their paths."""

    def whole(self, lm: LM) -> set[str]:
        """The paths of the model's own parameters that train, and are in the files."""
        del lm
        return set()

    def held(self, lm: LM) -> set[str]:
        """The paths of the model's own parameters that do not train, and are in the files all the same."""
        del lm
        return set()

    def wrapped(self, lm: LM) -> dict[str, str]:
        """By the names of the modules that have an adapter, what HF PEFT puts between such a name and `.weight`."""
        del lm
        return {}

    def changes_tied(self, lm: LM) -> bool:
        """Whether it changes an embedding that is the head too."""
        del lm
        return False

    def conflicts_with_new_model(self) -> Iterator[Conflict]:
        yield Conflict(
            f"peft.type is {self.type}, whose result is the adapter of a pretrained model, and model is new",
            "give model.path, or remove the peft section",
        )

    def conflicts_with_quantization(self, quantization: Quantization) -> Iterator[Conflict]:
        del quantization
        yield from ()

    def mask(self, lm: LM) -> Any:
        chosen = self.whole(lm)
        if lm.quantization is not None and (stored := sorted(filter(lm.quantization.replaces, chosen))):
            raise UserError(
                f"peft.modules_to_save trains {stored[0]}, which model.quantize stores in {lm.quantization}; leave it "
                "out, or remove quantize"
            )
        return tree.map_with_path(
            lambda path, _: path in chosen or (path in lm.extra and not lm.extra[path].frozen), lm.abstract()
        )

    def finished(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> "AdapterConfig":
        """What describes the adapter that training has made, of which these are the leaves."""
        del lm, leaves
        return self

    def description(self, lm: LM) -> dict[str, Any]:
        """adapter_config.json, but for what every adapter has there."""
        del lm
        return self.model_dump(mode="json", include={*self.described})

    def export(self, lm: LM, params: Params, folder: Path, *, model_folder: Path, base: str | None) -> None:
        """Writes the adapter in the files of HF PEFT; an older one in `folder` is replaced.

        Raises UserError for an adapter that is not finite.
        """
        leaves, whole, wrapped = tree.flatten(params), self.whole(lm) | self.held(lm), self.wrapped(lm)
        written = {path: leaves[path] for path in (*lm.extra, *whole)}
        check_finite(written, f"{folder}: not written", "Go on from an earlier checkpoint")
        extra = {path: on_host(lm, leaves[path]) for path in lm.extra}
        finished = self.finished(lm, extra)
        tensors = finished.tensors(lm, extra)
        for entry in weight_table(lm):
            if entry.path in whole:
                tensor = gather(lm, leaves[entry.path], entry)
                for name in entry.names:
                    module, _, kind = name.rpartition(".")
                    tensors[f"{PREFIX}{module}{wrapped.get(module, '')}.{kind}"] = tensor
        content = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            **finished.description(lm),
        }
        with replacing(folder.absolute(), sum(tensor.nbytes for tensor in tensors.values())) as new:
            write_tensors(tensors, new / ADAPTER_WEIGHTS)
            if jax.process_index() == 0:
                write_json(new / ADAPTER_CONFIG, content)


class StoredAdapter(AdapterConfig):
    """A method whose files hold all of what it has trained."""

    @abstractmethod
    def leaves(self, lm: LM, take: Take) -> dict[str, np.ndarray]:
        """The leaves that the files hold, by their paths; `lm` is a result of `add`."""


class AdapterOfParts(StoredAdapter):
    """A method whose leaves are in the files as they are, in parts."""

    @abstractmethod
    def parts(self, lm: LM) -> list[Part]:
        """Every tensor of the files except the tensors of `whole` and `held`, for `lm`, a result of `add`. Two parts
        with the same path and place are both in the files, and are equal."""

    def tensors(self, lm: LM, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {part.name: part.write(leaves[part.path]) for part in self.parts(lm)}

    def leaves(self, lm: LM, take: Take) -> dict[str, np.ndarray]:
        shapes, found, twins = tree.flatten(lm.abstract()), dict[str, np.ndarray](), dict[tuple[str, str], Part]()
        for part in self.parts(lm):
            shape, tensor = shapes[part.path], take(part.name, part.shape)
            leaf = found.setdefault(part.path, np.zeros(shape.shape, shape.dtype))
            twin = twins.setdefault((part.path, str(part.place)), part)
            if twin is not part and not np.array_equal(part.write(leaf), tensor.astype(leaf.dtype)):
                raise UserError(f"{part.name} and {twin.name} differ, and are one where the head is the embedding")
            part.read(tensor, leaf)
        return found


def _as_tuple(values: list[Any]) -> tuple[Any, ...]:
    """The list of a file, in order if it is one of texts or numbers: HF PEFT's order is chance."""
    alike = {type(value) for value in values} in ({str}, {int})
    return tuple(sorted(values) if alike else values)


def on_host(lm: LM, leaf: jax.Array) -> np.ndarray:
    """The whole of a leaf. A collective operation of all processes."""
    return np.asarray(jax.device_put(leaf, lm.layout.replicated).addressable_data(0))


ADAPTERS = Registry[type[StoredAdapter]]("peft_type")
"""By what HF PEFT calls it, the method that an adapter is of."""
