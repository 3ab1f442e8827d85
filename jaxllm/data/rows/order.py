"""Orders: which row stands at each place of an epoch. Each follows from its seed and the epoch alone."""

from enum import IntEnum
from typing import Protocol

import numpy as np


class Purpose(IntEnum):
    """What a random permutation is for; those for different purposes are independent under one seed."""

    SPLIT = 0
    PIECES = 1
    EPOCH = 2
    PASS = 3
    BATCHES = 4


def permutation(n: int, seed: int, purpose: Purpose, *which: int) -> np.ndarray:
    """A permutation of 0 … n − 1, int64 [n], with the same values under every version of numpy."""
    # numpy promises the bits of its bit generators for all versions, but not those of `permutation`.
    bits = np.random.Philox(np.random.SeedSequence((seed, purpose, *which))).random_raw(n)
    return np.argsort(bits, kind="stable")


class Order(Protocol):
    """The rows of each epoch; `str` says what is special about it."""

    def __len__(self) -> int:
        """The places in an epoch."""
        ...

    def __call__(self, epoch: int) -> np.ndarray:
        """The row at each place, int64 [places]; −1 where a place stays empty."""
        ...


class Shuffled:
    """Each of `rows` rows once an epoch, in random order."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows = rows
        self._seed = seed

    def __len__(self) -> int:
        return self._rows

    def __call__(self, epoch: int) -> np.ndarray:
        return permutation(self._rows, self._seed, Purpose.EPOCH, epoch)

    def __str__(self) -> str:
        return ""


class Grouped:
    """The rows of another order in batches of like length, after the length-grouped sampler of transformers.

    A batch holds rows of one bucket, taken in the order of `rows`; what is left of the buckets, fewer rows of
    each than a batch, stands together, the longest first. The batches come in random order, but for the last:
    empty places complete it, so that every epoch is a whole number of batches.

    Args:
        bucket: int64, the bucket of each row, a longer row having no smaller bucket.
        batch_size: rows in a batch; the order follows from it, too.
    """

    def __init__(self, rows: Order, bucket: np.ndarray, batch_size: int, seed: int) -> None:
        self._rows = rows
        self._bucket = bucket
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size) * self._batch_size

    def __call__(self, epoch: int) -> np.ndarray:
        order = self._rows(epoch)
        by_bucket = [order[self._bucket[order] == bucket] for bucket in range(int(self._bucket.max()), -1, -1)]
        whole = [len(rows) // self._batch_size * self._batch_size for rows in by_bucket]
        full = [rows[:end] for rows, end in zip(by_bucket, whole, strict=True)]
        left = [rows[end:] for rows, end in zip(by_bucket, whole, strict=True)]
        together = np.concatenate([*full, *left])
        end = len(together) // self._batch_size * self._batch_size
        batches = together[:end].reshape(-1, self._batch_size)
        batches = batches[permutation(len(batches), self._seed, Purpose.BATCHES, epoch)]
        last = together[end:]
        empty = np.full(-len(last) % self._batch_size, -1)
        return np.concatenate([batches.ravel(), last, empty])

    def __str__(self) -> str:
        return "; ".join(filter(None, ("in batches of like length", str(self._rows))))
