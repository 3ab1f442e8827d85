"""The device mesh, and the rules that lay named array axes on it.

A parameter says what its dimensions are (`("layers", "embed", "heads")`), an activation likewise
(`("batch", "act_length", "act_embed")`); one rule table maps those names to mesh axes. A user changes a
layout by a rule in the config, never in code.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pydantic import Field, model_validator

from jaxllm.core import tree
from jaxllm.core.config import Section
from jaxllm.core.errors import UserError, did_you_mean

# The fastest links serve the innermost axis.
AXES = ("pipeline", "data", "fsdp", "context", "tensor")

Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

# The vocabulary is split over fsdp as well, and the width of the two vocabulary matrices is not: a head split on
# its width would be gathered whole, and its gradient scattered whole, in every chunk of the loss. The stages of a
# pipeline share it too: none idles while the last one has its loss, and a tied matrix needs no sum across stages.
# Devices that share the length of sequences share the parameters too, as those of fsdp do.
DEFAULT_RULES: Rules = {
    "layers": ("pipeline",),
    "embed": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "rank": (),
    "vocab": ("pipeline", "fsdp", "context", "tensor"),
    "vocab_embed": (),
    "micro": (),
    "replicas": ("data",),
    "act_stages": ("pipeline",),
    "batch": ("data", "fsdp"),
    "act_length": ("context",),  # between the products of matrices
    "act_inner_length": ("context",),  # within attention and the feed-forward layer, which split their width
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("pipeline", "fsdp", "context", "tensor"),
    "act_vocab_batch": ("data",),
}


class MeshConfig(Section):
    """How many devices each mesh axis has; one axis may be -1, which means the rest of them."""

    pipeline: int = 1
    """stages that hold different layers, and work on different micro-batches at a time"""
    data: int = 1
    """groups of devices that train on different sequences, each with all parameters"""
    fsdp: int = -1
    """devices that train on different sequences and hold different parts of the parameters"""
    context: int = 1
    """devices that train on different parts of the same long sequences, of which each must be able to hold the keys
    and values of one layer, and hold different parts of the parameters"""
    tensor: int = 1
    """devices that share the matrices of a layer, and its sequences"""
    rules: dict[str, list[str]] = Field(default_factory=dict)
    """where single array axes lie instead: {act_length: [tensor]} is sequence parallelism, which splits what is between
    the products of matrices too (beside context it is [context, tensor]); {embed: [fsdp, tensor], mlp: []} splits
    other axes of the parameters"""

    @model_validator(mode="after")
    def _sizes(self) -> "MeshConfig":
        sizes = self.sizes
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{axis} must be a positive number of devices, or -1 for the rest; got {size}")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one mesh axis may be -1 (the rest of the devices); got {sizes}")
        for name, axes in self.rules.items():
            if name not in DEFAULT_RULES:
                raise ValueError(f"mesh.rules: unknown array axis {name!r}.{did_you_mean(name, DEFAULT_RULES)}")
            for axis in axes:
                if axis not in AXES:
                    raise ValueError(
                        f"mesh.rules.{name}: unknown mesh axis {axis!r}.{did_you_mean(axis, AXES)} Known: {AXES}"
                    )
            if self.context != 1 and name in ("act_length", "act_inner_length") and axes[:1] != ["context"]:
                raise ValueError(
                    f"mesh.rules.{name} is {axes}, and mesh.context splits the length over that axis first; set it to "
                    f"{['context', *(axis for axis in axes if axis != 'context')]}"
                )
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes as written, in the order of AXES."""
        return {axis: getattr(self, axis) for axis in AXES}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config` over `devices` (default: all). Raises UserError if the sizes do not multiply to them."""
    devices = jax.devices() if devices is None else list(devices)
    sizes, count = config.sizes, len(devices)
    known = math.prod(size for size in sizes.values() if size != -1)
    if -1 in sizes.values() and count % known == 0:
        sizes = {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != count:
        written = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
        refused = f"the mesh {written} does not fit the {count} device(s) here: "
        if -1 in sizes.values():
            raise UserError(
                f"{refused}the sizes beside the -1 multiply to {known}, which does not divide {count}. Choose sizes "
                "that do."
            )
        raise UserError(
            f"{refused}the sizes must multiply to {count}. Set one axis of `mesh` to -1 to give it the rest."
        )
    array = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclass(frozen=True)
class Layout:
    """A mesh, and the rules from array axes to mesh axes.

    `rules` maps every known axis name to the mesh axes that it is split over, major first.
    """

    mesh: Mesh
    rules: Rules

    @staticmethod
    def of(config: MeshConfig, devices: Sequence[Any] | None = None) -> "Layout":
        """The layout that a config asks for."""
        overrides = {name: tuple(axes) for name, axes in config.rules.items()}
        return Layout(make_mesh(config, devices), {**DEFAULT_RULES, **overrides})

    @staticmethod
    def single(device: Any = None) -> "Layout":
        """The layout of one device. A mesh of one device is a mesh: nothing is special about it."""
        return Layout.of(MeshConfig(fsdp=1), [device or jax.local_devices()[0]])

    def replace(self, **rules: tuple[str, ...]) -> "Layout":
        """The same mesh under changed rules."""
        return Layout(self.mesh, {**self.rules, **rules})

    def without(self, axis: str) -> "Layout":
        """The same mesh with nothing on `axis`, for what is mapped over that."""
        return self.replace(**{name: tuple(a for a in axes if a != axis) for name, axes in self.rules.items()})

    def size(self, name: str) -> int:
        """How many ways the array axis `name` is split."""
        return math.prod(self.mesh.shape[axis] for axis in self.rules[name])

    @property
    def stages(self) -> int:
        """How many devices, one behind the other, the layers of a model are split over."""
        return self.mesh.shape["pipeline"] if "pipeline" in self.rules["layers"] else 1

    def spec(self, axes: Axes, shape: Sequence[int] | None = None, leaf: str = "array") -> PartitionSpec:
        """The partition of an array with named `axes`, and `shape` where it is known.

        Raises UserError naming `leaf` for an unknown axis name, two dimensions on one mesh axis, or a dimension
        that does not divide. Mesh axes of size 1 split nothing and are left out.
        """
        if shape is not None and len(axes) != len(shape):
            raise UserError(f"{leaf}: {len(axes)} axis names {axes} for the shape {tuple(shape)}")
        used: dict[str, str | None] = {}
        spec: list[tuple[str, ...] | str | None] = []
        for i, name in enumerate(axes):
            if name is not None and name not in self.rules:
                raise UserError(f"{leaf}: unknown array axis {name!r}.{did_you_mean(name, self.rules)}")
            split = [axis for axis in (self.rules[name] if name else ()) if self.mesh.shape[axis] > 1]
            for axis in split:
                if axis in used:
                    raise UserError(
                        f"{leaf}: the axes {used[axis]!r} and {name!r} are both laid on the mesh axis {axis!r}; "
                        "change one of them in mesh.rules"
                    )
                used[axis] = name
            ways = math.prod(self.mesh.shape[axis] for axis in split)
            if shape is not None and shape[i] % ways:
                raise UserError(
                    f"{leaf}: dimension {i} ({name}) of size {shape[i]} does not divide by "
                    f"{' × '.join(f'{axis} {self.mesh.shape[axis]}' for axis in split)} = {ways}; "
                    f"change the mesh, or set mesh.rules.{name} to []"
                )
            spec.append(split[0] if len(split) == 1 else tuple(split) or None)
        return PartitionSpec(*spec)

    def sharding(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array whose dimensions are `axes`."""
        return NamedSharding(self.mesh, self.spec(axes))

    def local(self, name: str, size: int) -> slice:
        """The stretch of an array axis `name` of length `size` that lies on this process's devices.

        Raises UserError if it is not one stretch.
        """
        indices = self.sharding(name).addressable_devices_indices_map((size,)).values()
        parts = sorted({index[0].indices(size)[:2] for index in indices if index is not None})
        if any(end != start for (_, end), (start, _) in itertools.pairwise(parts)):
            raise UserError(
                f"this host's devices hold {len(parts)} separate parts of the axis {name!r} of {self}; choose a mesh "
                "in which the devices of a host stand side by side"
            )
        return slice(parts[0][0], parts[-1][1])

    @property
    def platform(self) -> str:
        """What the devices are: "gpu" or "cpu"."""
        return self.mesh.devices.flat[0].platform

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, axes: Any, abstract: Any) -> Any:
        """A tree of shardings for the tree `abstract` (of shapes) whose leaves have the named `axes`."""
        return tree.map_with_path(
            lambda path, shaped, names: NamedSharding(self.mesh, self.spec(names, shaped.shape, path)),
            abstract,
            axes,
        )

    def constrain(self, x: jax.Array, *axes: str | None, rest_free: bool = False) -> jax.Array:
        """`x`, laid out by `axes` at this point of a jitted computation.

        rest_free: whether `axes` are of the first dimensions alone, and the compiler lays out the others.
        """
        free = x.ndim - len(axes) if rest_free else 0
        spec = self.spec(axes, x.shape[: x.ndim - free], "the activations")
        spec = PartitionSpec(*spec, *[PartitionSpec.UNCONSTRAINED] * free)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def __str__(self) -> str:
        devices = self.mesh.devices
        kind = devices.flat[0].device_kind
        return f"{np.size(devices)} × {kind}: " + " × ".join(f"{a} {n}" for a, n in self.mesh.shape.items())
