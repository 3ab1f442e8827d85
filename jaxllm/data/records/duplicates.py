"""Which samples are of one record, or of records that say the same: such are never on both sides of an evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig, reading_options

Draw = Callable[[int, float], tuple[np.ndarray, np.ndarray]]

_NOT_SAID = {"role", "from", "train", "label", "weight"}  # keys of messages and segments whose values are no content


def content_of(columns: Mapping[str, Any], read: Iterable[str]) -> int:
    """A 64-bit hash of what a record says in the columns `read`, in their order.

    White space does not count, nor which column or message holds which part: the same conversation has the same hash
    in each format and file.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name in read:
        for part in _said(columns.get(name)):
            digest.update(part.encode(errors="surrogatepass"))
    return int.from_bytes(digest.digest(), "little")


def _said(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield "".join(value.split())
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in _NOT_SAID:
                yield from _said(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _said(inner)
    elif value is not None:
        yield f" {value}"


def numbered(values: np.ndarray) -> np.ndarray:
    """int64 [n]: equal values have equal numbers, 0, 1, … in the order in which they first appear."""
    _, first, number = np.unique(values, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[number]


def joined(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Numbers, as of `numbered`, of what is connected by equal numbers in `one` or in `other`; all int64 [n]."""
    label = one
    while True:
        before = label
        for key in (other, one):
            least = np.full(int(key.max(initial=0)) + 1, len(one), np.int64)
            np.minimum.at(least, key, label)
            label = least[key]
        if np.array_equal(label, before):
            return numbered(label)


def held_out_groups(parts: Sequence[np.ndarray], fraction: float, draw: Draw) -> np.ndarray:
    """bool [groups]: which groups are held out. `parts`: the group of each sample of each source that is mixed.

    `draw(n, fraction)` gives the places among n that are trained and those that are held out. A group that several
    parts have is drawn in the first of them.
    """
    unknown, trained, held_out = 0, 1, 2
    side = np.zeros(1 + max(int(part.max(initial=0)) for part in parts), np.int8)
    for part in parts:
        own = np.unique(part)
        new = own[side[own] == unknown]
        if len(new) == 1 and len(own) > 1:
            side[new] = trained
        elif len(new):
            keep, out = draw(len(new), fraction)
            side[new[keep]], side[new[out]] = trained, held_out
    return side == held_out


def refuse_overlaps(sources: Sequence[SourceConfig], files: Sequence[Sequence[str]]) -> None:
    """Raises UserError when two sources without weights read the same file in the same way: it would count twice."""
    if any(config.weight is not None for config in sources):
        return
    seen: dict[tuple[str, str], int] = {}
    for i, (config, of_source) in enumerate(zip(sources, files, strict=True)):
        options = json.dumps([reading_options(config), config.chat_template], sort_keys=True)
        for file in of_source:
            j = seen.setdefault((os.path.realpath(file), options), i)
            if j != i:
                raise UserError(
                    f"data.sources.{j} ({sources[j].path!r}) and data.sources.{i} ({config.path!r}) both have the file "
                    f"{file}, whose records would count twice; leave it out of one. To see its records more often than "
                    "others, give every source a weight"
                )
