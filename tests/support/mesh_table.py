"""Every mesh of eight devices with every kind of training: what must be equal to one device."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations as pairs_of
from itertools import product
from typing import Any, NamedTuple

import jax

from jaxllm.peft.lora import Lora
from jaxllm.step.selection import Draws
from tests.support.families import mesh_layout
from tests.support.optimizers import section
from tests.support.small_runs import Trained, llama, misses, train

DEVICES, STEPS = 8, 12
# Two programs that mean the same, in float64, of each leaf's largest value (DESIGN, section 5).
TOLERANCE = 1e-10

# Rounding grows with the rate: at 1e-3 some with tied heads are 2e-10 apart, at 1e-2, as shallower models train, 3e-9.
ADAMW = section("adamw", learning_rate=1e-4)
METHODS: dict[str, dict[str, Any]] = {
    "full, adamw": dict(optimizer=ADAMW),
    "full, adalomo fused": dict(optimizer=section("adalomo", learning_rate=1e-4), fused=True),
    "lora": dict(
        optimizer=ADAMW,
        method=Lora(type="lora", r=3, lora_alpha=6, target_modules=r".*_proj|.*embed_tokens|lm_head"),
    ),
    "lisa": dict(optimizer=ADAMW, lisa=Draws(active=3, interval=5, seed=0)),
}


class Combination(NamedTuple):
    """Sizes of the mesh, a method of `METHODS`, and whether batches are accumulated and packed and the head is tied.

    A pipeline of p stages takes p micro-batches, and twice as many where it accumulates.
    """

    pipeline: int
    data: int
    fsdp: int
    tensor: int
    method: str
    accumulated: bool
    packed: bool
    tied: bool

    def __str__(self) -> str:
        sizes = zip(("pipeline", "data", "fsdp", "tensor"), self[:4], strict=True)
        mesh = " × ".join(f"{axis} {size}" for axis, size in sizes if size > 1)
        flags = [name for name in ("accumulated", "packed", "tied") if getattr(self, name)]
        return ", ".join([mesh, self.method, *flags])

    @property
    def traits(self) -> frozenset[tuple[str, Any]]:
        """What it has of each kind; of an axis whether it is there."""
        return frozenset(
            (name, value > 1 if name in ("pipeline", "data", "fsdp", "tensor") else value)
            for name, value in self._asdict().items()
        )

    def difference(self) -> float:
        """The largest difference to one device of a metric, parameter or moment, as a part of its largest value."""
        with jax.enable_x64(True):
            sizes = dict(pipeline=self.pipeline, data=self.data, fsdp=self.fsdp, tensor=self.tensor)
            micro_batches = self.pipeline * (2 if self.accumulated else 1)
            ours = _trained(self, mesh_layout(**sizes), micro_batches)
            return max(max(part.values()) for part in misses(ours, _one_device(self.method, self.packed, self.tied)))


def _trained(of: Combination, layout: Any, micro_batches: int) -> Trained:
    model = llama(num_hidden_layers=8, tie_word_embeddings=of.tied)
    how = dict(steps=STEPS, micro_batches=micro_batches, packed=of.packed, dtype="float64")
    return train(model, layout, **how, **METHODS[of.method])


@cache
def _one_device(method: str, packed: bool, tied: bool) -> Trained:
    return _trained(Combination(1, 1, 1, 1, method, False, packed, tied), None, 1)


def meshes() -> Iterator[tuple[int, int, int, int]]:
    """The factorisations of the devices into pipeline, data, fsdp and tensor."""
    sizes = [2**i for i in range(DEVICES.bit_length())]
    for p, d, f in product(sizes, repeat=3):
        if p * d * f <= DEVICES:
            yield p, d, f, DEVICES // (p * d * f)


def every() -> list[Combination]:
    """The whole table."""
    return [Combination(*mesh, *rest) for mesh in meshes() for rest in product(METHODS, *[(False, True)] * 3)]


def covering() -> list[Combination]:
    """Few combinations in which every two traits that can meet do, each the one with most pairs that are left."""
    table = every()
    left = {pair for one in table for pair in _pairs(one)}
    chosen = []
    while left:
        best = max(table, key=lambda one: len(left & _pairs(one)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen


@cache
def _pairs(one: Combination) -> frozenset[frozenset[tuple[str, Any]]]:
    return frozenset(map(frozenset, pairs_of(one.traits, 2)))


def of_each_mesh(besides: Sequence[Combination]) -> list[Combination]:
    """For each mesh that `besides` lacks one combination, methods and the rest in turn."""
    there = {one[:4] for one in besides}
    new = [mesh for mesh in meshes() if mesh not in there]
    rest = list(product(METHODS, *[(False, True)] * 3))
    return [Combination(*mesh, *rest[(i * 9 + 5) % len(rest)]) for i, mesh in enumerate(new)]
