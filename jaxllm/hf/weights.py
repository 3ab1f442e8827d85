"""Tensors of a checkpoint, read into sharded parameters."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.hf.config import parse_config
from jaxllm.hf.source import DTYPES, Source, read_source
from jaxllm.models.fit_layout import fitted
from jaxllm.models.lm import LM
from jaxllm.models.rules import Index, Rule

Bounds = tuple[tuple[int, int], ...]

# How much of two tied tensors is compared at a time.
_COMPARED_BYTES = 64 * 2**20


def read_model(
    folder: str | Path,
    layout: Layout,
    param_dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
) -> LM:
    """The model of a Hugging Face checkpoint, without its arrays; `load_params` reads those.

    param_dtype: of every parameter; None = each as in its file.
    compute_dtype: None = bfloat16 on GPU, float32 on CPU.

    Raises UserError for whatever is wrong with the folder, before anything is allocated, and for a layout
    that does not fit the model.
    """
    source = read_source(folder)
    family, config = parse_config(source.config, source.folder / "config.json")
    lm = fitted(family, config, layout, compute_dtype=compute_dtype, source=source)
    check(lm, source)
    stored = stored_dtypes(lm, source)
    return replace(lm, param_dtype=stored if param_dtype is None else jnp.dtype(param_dtype))


@dataclass(frozen=True)
class Entry:
    """One tensor of a model's files: parameter `path` (of `layer`, if it is stacked), by `rule`.

    shape: in the file. names: what it is called there; of tied weights any of them, or both.
    """

    path: str
    layer: int | None
    rule: Rule
    shape: tuple[int, ...]
    names: tuple[str, ...]

    def stored(self, source: Source) -> list[str]:
        """The names under which the files of `source` hold this tensor."""
        return [name for name in self.names if name in source.tensors]


def weight_table(lm: LM) -> list[Entry]:
    """Every tensor that the files of `lm` hold: layer by layer between the embedding and the last norm."""
    leaves = tree.flatten(lm.plain.abstract())
    rules = lm.family.rules(lm.config)
    entries = []
    for rule in rules:
        shape = list(leaves[rule.path].shape)[rule.stacked :]
        if rule.vocab_axis is not None:
            shape[rule.vocab_axis] = lm.config.vocab_size
        layers = range(lm.config.num_hidden_layers) if rule.stacked else (None,)
        for i in layers:
            names = tuple(name.replace("{i}", str(i)) for name in (rule.key, rule.alias) if name)
            entries.append(Entry(rule.path, i, rule, rule.operation.shape(tuple(shape)), names))
    place = {"embed": -2, "layers": -1}
    return sorted(entries, key=lambda e: (place.get(e.path.split("/")[0], 0), e.layer or 0))


def check(lm: LM, source: Source) -> None:
    """Raises UserError unless the files of `source` hold exactly the tensors of `lm`."""
    entries = weight_table(lm)
    missing = [entry for entry in entries if not entry.stored(source)]
    if missing:
        raise UserError(
            f"{source.folder}: the files lack {_count(missing)} that config.json asks for, first "
            f"{missing[0].names[0]!r} of shape {list(missing[0].shape)}; copy or download the weights again, "
            "or correct config.json"
        )
    known = {name for entry in entries for name in entry.names}
    surplus = [name for name in source.tensors if name not in known]
    if surplus:
        where = source.tensors[surplus[0]].file
        raise UserError(
            f"{source.folder / where}: holds {_count(surplus)} that the model of config.json does not have, "
            f"first {surplus[0]!r}; nothing is left out in silence: correct config.json (number of layers, "
            "biases, tied head), or the files"
        )
    for entry in entries:
        for name in entry.stored(source):
            tensor = source.tensors[name]
            where = f"{source.folder / tensor.file}: {name!r}"
            if tensor.shape != entry.shape:
                raise UserError(
                    f"{where} has the shape {list(tensor.shape)}; by config.json it is {list(entry.shape)}: "
                    "correct config.json, or take the files that belong to it"
                )
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{where} is {tensor.dtype}; weights must be {', '.join(DTYPES)}: use a checkpoint that "
                    "is not quantised, or convert it with transformers"
                )
        if len(entry.stored(source)) == 2:
            _check_equal(source, *entry.stored(source))


def stored_dtypes(lm: LM, source: Source) -> Any:
    """The dtype that each parameter has in the files: one, or one for each path where they differ.

    Where layers of one stack differ, the one that holds them all exactly.
    """
    dtypes: dict[str, Any] = {}
    for entry in weight_table(lm):
        dtype = DTYPES[source.tensors[entry.stored(source)[0]].dtype]
        dtypes[entry.path] = jnp.promote_types(dtypes.get(entry.path, dtype), dtype)
    distinct = set(dtypes.values())
    return distinct.pop() if len(distinct) == 1 else dtypes


def load_params(lm: LM) -> Params:
    """The parameters of `lm` from the checkpoint `lm.source`, laid out by `lm.layout`, in `lm.param_dtype`.

    Each process reads the slices of its own devices alone, one tensor at a time: its host holds at most its
    shards (where the host is no device, those of one parameter) and one tensor. Rows that pad the vocabulary
    are zeros. Of matrices that are to be quantised, the device holds one at a time as it is in the files.
    """
    entries: dict[str, list[Entry]] = {}
    for entry in weight_table(lm):
        entries.setdefault(entry.path, []).append(entry)

    def read(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        # Devices that hold the same slices (replicas) share one array on the host.
        done: dict[Any, np.ndarray] = {}

        def shard(index: Index | None) -> np.ndarray:
            assert index is not None
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape, strict=True))
            if bounds not in done:
                done[bounds] = _read_shard(lm, entries[path], bounds, np.dtype(leaf.dtype))
            return done[bounds]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, shard, dtype=leaf.dtype)

    wanted, plain = tree.flatten(lm.abstract()), tree.flatten(lm.plain.abstract())
    leaves = {path: read(path, leaf) for path, leaf in plain.items() if path in wanted}
    if lm.quantization is not None:
        for path in plain.keys() - wanted.keys():
            folder = path.rpartition("/")[0]
            stored = {name: wanted[f"{folder}/{name}"] for name in lm.quantization.stored(path, plain[path].shape)}
            matrices = _layers(lm, entries[path], plain[path])
            of_path = lm.quantization.quantized(matrices, stored)
            leaves |= {f"{folder}/{name}": leaf for name, leaf in of_path.items()}
    return tree.insert({}, leaves)


def _layers(lm: LM, entries: list[Entry], stack: jax.ShapeDtypeStruct) -> Iterator[jax.Array]:
    """The matrices of a stack, one after the other, each laid out as it is in the stack."""
    shape, sharding = stack.shape[1:], stack.sharding
    assert isinstance(sharding, NamedSharding)
    sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    for entry in entries:

        def shard(index: Index | None, entry: Entry = entry) -> np.ndarray:
            assert index is not None
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
            out = _aligned_empty(tuple(stop - start for start, stop in bounds), np.dtype(stack.dtype))
            _fill(out, lm, entry, bounds)
            return out

        yield jax.make_array_from_callback(shape, sharding, shard, dtype=stack.dtype)


def _read_shard(lm: LM, entries: list[Entry], bounds: Bounds, dtype: np.dtype) -> np.ndarray:
    """The part of a parameter between `bounds`, of the tensors `entries`: one, or one a layer."""
    shard = _aligned_empty(tuple(stop - start for start, stop in bounds), dtype)
    rule = entries[0].rule
    if not rule.stacked:
        _fill(shard, lm, entries[0], bounds)
    else:
        for row, entry in zip(shard, entries[slice(*bounds[0])], strict=True):
            _fill(row, lm, entry, bounds[1:])
    return shard


def _fill(out: np.ndarray, lm: LM, entry: Entry, bounds: Bounds) -> None:
    """Copies one tensor's slices into `out`, cast to its dtype."""
    ends = [stop for _, stop in bounds]
    axis = entry.rule.vocab_axis
    if axis is not None:
        ends[axis] = min(ends[axis], lm.config.vocab_size)
        real = max(0, ends[axis] - bounds[axis][0])
        before = (slice(None),) * axis
        out[(*before, slice(real, None))] = 0
        out = out[(*before, slice(real))]
    if out.size:
        index = tuple(slice(start, end) for (start, _), end in zip(bounds, ends, strict=True))
        part = lm.source.read(entry.stored(lm.source)[0], entry.rule.operation.index(index))
        copy(entry.rule.operation.read(part, index), out)


def copy(source: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`out`, filled with `source` and cast to its dtype.

    Most sources are transposed: in strips that the processor's cache holds, they are copied several times faster
    than in one piece.
    """
    width = 64 if out.ndim > 1 else out.size
    for start in range(0, out.shape[-1], width):
        strip = (..., slice(start, start + width))
        out[strip] = source[strip]
    return out


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array, at an address that XLA's CPU backend takes without making a copy."""
    size, alignment = math.prod(shape) * dtype.itemsize, 64
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _check_equal(source: Source, key: str, alias: str) -> None:
    """Raises UserError unless two tensors that a tied model shares have the same bits."""
    first, second = source.tensors[key], source.tensors[alias]
    rows = max(1, _COMPARED_BYTES // (first.shape[1] * DTYPES[first.dtype].itemsize))
    same = first.dtype == second.dtype
    for start in range(0, first.shape[0], rows) if same else ():
        part = (slice(start, min(start + rows, first.shape[0])), slice(None))
        same = same and source.read(key, part).tobytes() == source.read(alias, part).tobytes()
    if not same:
        raise UserError(
            f"{source.folder}: {key!r} and {alias!r} differ, but tie_word_embeddings in config.json says "
            "that they are one matrix; set it to false if the head is its own, or remove the wrong tensor"
        )


def _count(tensors: list[Any]) -> str:
    return f"{len(tensors)} tensor{'' if len(tensors) == 1 else 's'}"
