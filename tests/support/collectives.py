"""The collectives of a compiled program: what is sent over which axes of the mesh, and how often in a step."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


class Collective(NamedTuple):
    """Arrays that are sent together.

    over: the axes of the mesh. times: how often a step runs it; a loop whose trips the text does not have counts once.
    arrays: `(dtype, shape)` of what each device has of them afterwards. where: of the program.
    """

    kind: str
    over: tuple[str, ...]
    times: int
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    where: str


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Those of a compiled program's text for a mesh with axes of these sizes."""
    lines, entry = _by_computation(text)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for line in lines[name]:
            if match := _COLLECTIVE.search(line):
                where = re.search(r'op_name="([^"]*)"', line)
                arrays = _arrays_after(*match.groups())
                found.append(Collective(match[2], _axes(line, mesh), times, arrays, where[1] if where else ""))
            else:  # what a collective calls adds two numbers
                for called, trips in _calls(line):
                    visit(called, times * trips)

    visit(entry, 1)
    return found


def counted(of: Iterable[Collective]) -> Counter[tuple[str, tuple[str, ...]]]:
    """How many arrays are sent in a step, by kind and axes, single numbers left out.

    XLA sends several arrays together as it sees fit.
    """
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one in of:
        counts[one.kind, one.over] += one.times * sum(bool(shape) for _, shape in one.arrays)
    return counts


def _by_computation(text: str) -> tuple[dict[str, list[str]], str]:
    lines: dict[str, list[str]] = defaultdict(list)
    name = entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[2]
            entry = name if match[1] else entry
        elif line.startswith(" "):
            lines[name].append(line)
    return lines, entry


def _calls(line: str) -> Iterator[tuple[str, int]]:
    trips = _TRIPS.search(line)
    for called in _CALLED.findall(line):
        yield called, int(trips[1]) if trips else 1
    if branches := _BRANCHES.search(line):
        for called in branches[1].split(","):
            yield called.strip().lstrip("%"), 1


def _arrays_after(result: str, kind: str, started: str | None) -> tuple[tuple[str, tuple[int, ...]], ...]:
    arrays = [(dtype, tuple(int(n) for n in shape.split(",") if n)) for dtype, shape in _ARRAY.findall(result)]
    if started and kind != "all-reduce":  # the operands, then the results, then what the transfer itself needs
        arrays = [array for array in arrays if array != ("u32", ())]
        arrays = arrays[len(arrays) // 2 :]
    return tuple(arrays)


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(np.arange(np.prod([*mesh.values()])), [*mesh.values()]), axis=1)
    varies = np.zeros(len(mesh), bool)
    for group in _groups(line):
        varies |= (places[group] != places[group[0]]).any(axis=0)
    return tuple(axis for axis, moved in zip(mesh, varies, strict=True) if moved)


def _groups(line: str) -> Iterable[list[int]]:
    """The devices of each group; XLA has three ways to write them."""
    if match := _IOTA.search(line):
        return _laid_out(match[2], match[3]).reshape(_numbers(match[1])).tolist()
    if match := _NAMED.search(line):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        chosen = [name.strip("' ") for name in match[4].split(",")]
        assert set(chosen) <= sizes.keys(), f"a part of an axis: {line}"
        count = int(np.prod([*sizes.values()]))
        ids = _laid_out(match[2] or str(count), match[3]).reshape([*sizes.values()])
        last = np.moveaxis(ids, [[*sizes].index(name) for name in chosen], range(-len(chosen), 0))
        return last.reshape(-1, int(np.prod([sizes[name] for name in chosen]))).tolist()
    match = _LISTED.search(line)
    assert match, f"which devices take part is not said: {line}"
    return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", match[1])]


def _laid_out(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(np.prod(_numbers(dims))).reshape(_numbers(dims))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]
