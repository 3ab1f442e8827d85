"""Parameters, written as a Hugging Face checkpoint."""

import errno
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.finite import check_finite
from jaxllm.core.tree import Params
from jaxllm.files.hub import TOKENIZER_FILES
from jaxllm.files.side_files import SIDE_FILES, read_side_files
from jaxllm.hf.config import read_config, write_config
from jaxllm.hf.source import ADAPTER_CONFIG, DTYPES, INDEX, WEIGHTS, Source
from jaxllm.hf.weights import Entry, copy, weight_table
from jaxllm.models.lm import LM

# Of a model that did not come in files: the size that Hugging Face's own tools split at.
SHARD_BYTES = 5 * 10**9


def save(
    lm: LM,
    params: Params,
    folder: str | Path,
    *,
    model_folder: str | Path | None = None,
) -> None:
    """Writes `params` as a checkpoint that `transformers` loads; every process must call it, and one writes.

    A model that came from a checkpoint goes back into its tensor names, files and config.json; a new one is
    written as `model.safetensors`, or split with an index where it is large. Each tensor has the dtype of its
    parameter. The host holds one file's tensors at a time. The folder appears when it is complete: a killed
    export leaves the old one, if there was any.

    model_folder: where config.json, of which only what changed is updated, the tokenizer's files and the settings of
        generation come from; None = from the model's source.

    Raises UserError for parameters that are not the model's or not finite, for a folder that holds something else, for
    a model_folder without a tokenizer, for a damaged file among those that go along, and for a full disk.
    """
    replace(lm.plain, extra={}).check_params(params)
    check_finite(params, f"{folder}: not written", "Export the weights of an earlier checkpoint")
    folder = Path(folder).absolute()
    source: Source | None = lm.source
    check_replaceable(folder, source)
    side_files = _side_files(source, model_folder)
    leaves = tree.flatten(params)
    entries = {name: entry for entry in weight_table(lm) for name in _names(entry, source)}
    sizes = {name: math.prod(e.shape) * leaves[e.path].dtype.itemsize for name, e in entries.items()}
    files = _split(sizes, source)
    unchanged = source is not None and all(
        entry.shape == source.tensors[name].shape and leaves[entry.path].dtype == DTYPES.get(source.tensors[name].dtype)
        for name, entry in entries.items()
    )
    dtype = None if unchanged else Counter(leaf.dtype.name for leaf in leaves.values()).most_common(1)[0][0]
    raw = read_config(model_folder) if model_folder else source.config if source else None
    config = write_config(lm.family, lm.config, source=raw, dtype=dtype)

    with replacing(folder, sum(sizes.values())) as new:
        for file, names in files.items():
            tensors = {}
            for name in names:
                tensor = gather(lm, leaves[entries[name].path], entries[name])
                if jax.process_index() == 0:
                    tensors[name] = tensor
            write_tensors(tensors, new / file)
        if jax.process_index() == 0:
            if len(files) > 1 or (source and source.index is not None):
                write_json(new / INDEX, _index(files, sizes, source, unchanged))
            write_json(new / "config.json", config)
            for name, content in side_files.items():
                (new / name).write_bytes(content)


@contextmanager
def replacing(folder: Path, total: int) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block is done, on a disk with room for `total` bytes.

    Every process must enter it, and process 0 alone may write. Raises UserError for what the disk refuses.
    """
    writes = jax.process_index() == 0
    new = folder.with_name(f".{folder.name}.partial")
    with _disk_errors(folder, total):
        if writes:
            _make_room(new, total)
        yield new
        if writes:
            _swap(new, folder)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export {folder}")


def write_tensors(tensors: dict[str, np.ndarray], file: Path) -> None:
    """Writes a safetensors file, if this is process 0."""
    if jax.process_index() == 0:
        save_file(tensors, file, metadata={"format": "pt"})
        # safetensors makes files for their owner alone; they should be as open as any new file.
        file.chmod(file.parent.stat().st_mode & 0o666)


def check_replaceable(folder: Path, source: Source | None = None, *, adapter: bool = False) -> None:
    """Raises UserError unless an export may take the place of `folder`: none, empty or an older one of its kind.

    adapter: whether an adapter is exported, and not a model.
    """
    if source is not None and folder.resolve() == source.folder.resolve():
        raise UserError(f"{folder}: is the checkpoint that this model came from; write to another folder")
    if not folder.exists():
        return
    known = {ADAPTER_CONFIG} if adapter else {"config.json", INDEX, *SIDE_FILES}
    files = [folder] if folder.is_file() else [*folder.iterdir()]
    others = [file for file in files if not file.is_file() or not (file.suffix == ".safetensors" or file.name in known)]
    if others:
        raise UserError(
            f"{folder}: holds {others[0].name!r}, which is not part of a Hugging Face export of "
            f"{'an adapter' if adapter else 'a model'}; nothing was written. Choose an empty or new folder."
        )


def _side_files(source: Source | None, model_folder: str | Path | None) -> dict[str, bytes]:
    """The content of the files to copy, from `model_folder` or otherwise from the source's folder."""
    if model_folder is not None:
        files = read_side_files(model_folder)
        if files.keys().isdisjoint(TOKENIZER_FILES):
            names = ", ".join(TOKENIZER_FILES)
            raise UserError(f"{model_folder}: has none of a tokenizer's files ({names})")
        return files
    if source is None:
        return {}
    for name in source.side_files:
        if not (source.folder / name).is_file():
            raise UserError(f"{source.folder / name}: was there when the model was read, and is gone; put it back")
    return read_side_files(source.folder, source.side_files)


def _names(entry: Entry, source: Source | None) -> list[str]:
    """The names under which a tensor is written: of tied weights those that the source has, one or both."""
    return entry.stored(source) if source else [entry.names[0]]


def _split(sizes: Mapping[str, int], source: Source | None) -> dict[str, list[str]]:
    """Which tensors go to which file: as in the source, or in order, as many as SHARD_BYTES hold."""
    if source is not None:
        files: dict[str, list[str]] = {}
        for name, tensor in source.tensors.items():
            files.setdefault(tensor.file, []).append(name)
        return files
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


def _index(
    files: Mapping[str, list[str]], sizes: Mapping[str, int], source: Source | None, unchanged: bool
) -> dict[str, Any]:
    kept = (source.index if source else None) or {}
    metadata = kept.get("metadata", {}) if unchanged else {"total_size": sum(sizes.values())}
    weight_map = {name: file for file, names in files.items() for name in names}
    return {**kept, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


@partial(jax.jit, static_argnames="sharding")
def _layer(leaf: jax.Array, i: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), sharding)


def gather(lm: LM, leaf: jax.Array, entry: Entry) -> np.ndarray:
    """One tensor as it stands in the file, whole. A collective operation of all processes."""
    everywhere, axis = lm.layout.replicated, entry.rule.vocab_axis
    i = entry.layer
    whole = jax.device_put(leaf, everywhere) if i is None else _layer(leaf, np.int32(i), everywhere)
    # Any of the copies: all devices hold the same.
    tensor = np.asarray(whole.addressable_data(0))
    if axis is not None:
        tensor = tensor[(*[slice(None)] * axis, slice(lm.config.vocab_size))]
    tensor = entry.rule.operation.write(tensor)
    return copy(tensor, np.empty(tensor.shape, tensor.dtype))


def _make_room(new: Path, total: int) -> None:
    """An empty folder `new`, on a disk with room for `total` bytes; what a killed export left is removed."""
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    if shutil.disk_usage(new).free < total:
        raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def _disk_errors(folder: Path, total: int) -> Iterator[None]:
    """Turns what a disk refuses into a UserError, and leaves nothing half-made."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        new = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(new, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{folder}: the export of {total / 1e9:.2f} GB could not be written ({reason}), and nothing was "
            "changed; free some space, or choose another folder"
        ) from error


def _swap(new: Path, folder: Path) -> None:
    """Puts the finished folder `new` in the place of `folder`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as transformers does."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
