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
    """An invertible change between a file's tensor and one layer of a parameter.

    order: of which place in the file each entry of the parameter's last axis is; None: of its own.
    """

    @property
    def order(self) -> np.ndarray | None: ...

    def shape(self, shape: Shape) -> Shape:
        """The tensor's shape in the file, of a parameter of `shape`."""
        ...

    def index(self, index: Index) -> Index:
        """The slices of the file's tensor that hold the parameter's slices `index`."""
        ...

    def read(self, tensor: np.ndarray, index: Index | None = None) -> np.ndarray:
        """The parameter, of the file's tensor; or its slices `index`, of those of the tensor that hold them."""
        ...

    def write(self, parameter: np.ndarray) -> np.ndarray:
        """The inverse of `read`."""
        ...


class Same:
    """The tensor as it is."""

    order = None

    def shape(self, shape: Shape) -> Shape:
        return shape

    def index(self, index: Index) -> Index:
        return index

    def read(self, tensor: np.ndarray, index: Index | None = None) -> np.ndarray:
        del index
        return tensor

    def write(self, parameter: np.ndarray) -> np.ndarray:
        return parameter


class Transposed:
    """A matrix stored the other way round: torch keeps `[out, in]`."""

    order = None

    def shape(self, shape: Shape) -> Shape:
        return shape[::-1]

    def index(self, index: Index) -> Index:
        return index[::-1]

    def read(self, tensor: np.ndarray, index: Index | None = None) -> np.ndarray:
        del index
        return tensor.T

    def write(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.T


@dataclass(frozen=True)
class Interleaved:
    """Several matrices that the file has as one, `[out, in]`, the rows of the first before those of the next.

    The parameter `[in, out]` has their columns in groups, in each a share of every matrix. So whoever has some of the
    groups has what belongs together: a key head beside its query heads, a column of the gate beside what it gates.

    rows: of each matrix. groups: how many, each with an equal share of each matrix.
    """

    rows: tuple[int, ...]
    groups: int

    @property
    def order(self) -> np.ndarray:
        matrices = np.split(np.arange(sum(self.rows)), np.cumsum(self.rows)[:-1])
        return np.concatenate([rows.reshape(self.groups, -1) for rows in matrices], axis=1).reshape(-1)

    def shape(self, shape: Shape) -> Shape:
        return shape[::-1]

    def index(self, index: Index) -> Index:
        # All rows, of which `read` takes those that are meant: they stand apart from each other.
        of_input, _ = index
        return slice(None), of_input

    def read(self, tensor: np.ndarray, index: Index | None = None) -> np.ndarray:
        order = self.order if index is None else self.order[index[1]]
        return tensor[order].T

    def write(self, parameter: np.ndarray) -> np.ndarray:
        return parameter.T[np.argsort(self.order)]


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
