"""The table between a model's parameters and the tensors of a Hugging Face checkpoint, for both directions.

A rule says which tensor of a file a parameter is; an operation on the way knows its inverse. One table serves
reading and writing, and covers exactly the parameter tree and exactly the file's keys.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

Index = tuple[slice, ...]
Shape = tuple[int, ...]


class Operation(Protocol):
    """An invertible change between a file's tensor and one layer of a parameter."""

    def shape(self, shape: Shape) -> Shape:
        """The tensor's shape in the file, of a parameter of `shape`."""
        ...

    def index(self, index: Index) -> Index:
        """The slices of the file's tensor that hold the parameter's slices `index`."""
        ...

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, of the file's tensor (or of matching slices)."""
        ...

    def write(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `read`."""
        ...


class Same:
    """The tensor as it is."""

    def shape(self, shape: Shape) -> Shape:
        return shape

    def index(self, index: Index) -> Index:
        return index

    def read(self, tensor: np.ndarray) -> np.ndarray:
        return tensor

    def write(self, parameter: np.ndarray) -> np.ndarray:
        return parameter


class Transposed:
    """A matrix stored the other way round: torch keeps `[out, in]`."""

    def shape(self, shape: Shape) -> Shape:
        return shape[::-1]

    def index(self, index: Index) -> Index:
        return index[::-1]

    def read(self, tensor: np.ndarray) -> np.ndarray:
        return tensor.T

    def write(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.T


SAME, T = Same(), Transposed()


@dataclass(frozen=True)
class Rule:
    """Parameter `path` is the tensor `key` (with `{i}` for the layer, if it is stacked) after `operation`.

    alias: another key that may hold the same tensor in a file, of tied weights: a file has either, or both.
    vocab_axis: the dimension of the parameter that is padded in memory, and cut on export.
    """

    path: str
    key: str
    operation: Operation = SAME
    alias: str | None = None
    vocab_axis: int | None = None

    @property
    def stacked(self) -> bool:
        """Whether the parameter has a leading `layers` axis."""
        return "{i}" in self.key
