"""Meshes, methods, accumulation, packing and tied heads together: equal to one device.

The whole table takes an hour or two; `scripts/bench/combinations.py` runs it and stores what it found.
"""

from typing import Any

import pytest

from tests.support.mesh_table import METHODS, TOLERANCE, Combination, covering, every, meshes, of_each_mesh

COVERING = covering()


@pytest.mark.parametrize("one", COVERING, ids=str)
def test_every_pair_of_traits(one: Combination) -> None:
    assert one.difference() <= TOLERANCE


@pytest.mark.tables
@pytest.mark.parametrize("one", of_each_mesh(COVERING), ids=str)
def test_every_other_mesh(one: Combination) -> None:
    assert one.difference() <= TOLERANCE


def test_the_table_is_the_table() -> None:
    """Four axes whose sizes multiply to eight; and the covering list has every pair that the table has."""
    table = every()
    assert len({*meshes()}) == 20
    assert len({*table}) == len(table) == 20 * len(METHODS) * 8
    assert all(one.pipeline * one.data * one.fsdp * one.tensor == 8 for one in table)
    assert pairs(table) == pairs(COVERING)
    assert len(COVERING) < 20


def pairs(chosen: list[Combination]) -> set[frozenset[tuple[str, Any]]]:
    return {frozenset((a, b)) for one in chosen for a in one.traits for b in one.traits}
