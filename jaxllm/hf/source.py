"""A Hugging Face checkpoint as it is on disk: which tensor is in which file, and what lies beside."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxllm.core.errors import UserError
from jaxllm.files.side_files import SIDE_FILES
from jaxllm.hf.config import RawConfig, read_config, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What HF PEFT calls the description of an adapter, and its weights.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# The dtypes of a checkpoint that can be trained, by the names of safetensors.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}

# Buffers of early Llama files, computed from the config ever since.
_BUFFER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is, and what it is. dtype: safetensors' name for it, such as "BF16"."""

    file: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where a model came from, and everything that its export gives back.

    config: `config.json` as read. tensors: by their names in the files. index: `model.safetensors.index.json`
    without its map, None for a checkpoint of one file. side_files: the names of the tokenizer's and others.
    """

    folder: Path
    config: RawConfig = field(repr=False)
    tensors: dict[str, StoredTensor] = field(repr=False)
    index: dict[str, Any] | None = field(repr=False)
    side_files: tuple[str, ...] = field(repr=False)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The slices `index` of a tensor, without reading the rest of it.

        The file is opened for each tensor: pages of the last one do not stay in this process's memory.
        """
        with open_weights(self.folder / self.tensors[name].file) as file:
            return file.get_slice(name)[index]


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises UserError if it is missing or not whole."""
    try:
        file = safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise UserError(f"{path}: this file of the checkpoint is missing; copy or download it") from None
    except (OSError, SafetensorError) as error:
        size = path.stat().st_size
        raise UserError(
            f"{path}: is not a whole safetensors file ({error}; it has {size:,} bytes, as after a copy that "
            "was cut short); copy or download it again"
        ) from error
    with file:
        yield file


def read_source(folder: str | Path) -> Source:
    """The checkpoint in `folder`; reads headers, no tensors.

    Raises UserError for a missing, truncated or surplus file or tensor, and for weights that are pickles.
    """
    folder = Path(folder)
    config = read_config(folder)
    if (folder / WEIGHTS).is_file():
        index, files, wanted = None, [WEIGHTS], None
    elif (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        wanted = _weight_map(index, folder / INDEX)
        index = {name: value for name, value in index.items() if name != "weight_map"}
        files = sorted(set(wanted.values()))
    else:
        raise UserError(_no_weights(folder))
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        with open_weights(folder / name) as file:
            for key in sorted(file.keys()):
                if wanted is not None and wanted.get(key) != name:
                    if key in wanted or _BUFFER.search(key):
                        continue
                    raise UserError(f"{folder / name}: holds the tensor {key!r}, which {INDEX} does not name")
                part = file.get_slice(key)
                tensors[key] = StoredTensor(name, part.get_dtype(), tuple(part.get_shape()))
    for key, name in (wanted or {}).items():
        if key not in tensors:
            raise UserError(f"{folder / name}: lacks the tensor {key!r}, which {INDEX} says is there")
    tensors = {key: tensor for key, tensor in tensors.items() if not _BUFFER.search(key)}
    side_files = tuple(name for name in SIDE_FILES if (folder / name).is_file())
    return Source(folder, config, tensors, index, side_files)


def _weight_map(index: dict[str, Any], path: Path) -> dict[str, str]:
    wanted = index.get("weight_map")
    if not isinstance(wanted, dict) or not wanted:
        raise UserError(f"{path}: has no `weight_map` from tensors to files; copy or download it again")
    for key, name in wanted.items():
        # Nothing outside of the folder is read, whatever the file asks for.
        if not isinstance(name, str) or name != Path(name.replace("\\", "/")).name or name in ("", ".", ".."):
            raise UserError(f"{path}: {key!r} points to {name!r}, which is not the name of a file beside it")
        if not name.endswith(".safetensors"):
            raise UserError(f"{path}: {key!r} points to {name!r}, which is not a safetensors file")
    return wanted


def _no_weights(folder: Path) -> str:
    suffixes = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in suffixes)
    if not pickles:
        return f"{folder}: has neither {WEIGHTS} nor {INDEX}; copy or download the weights"
    return (
        f"{folder}: its weights are pickles ({', '.join(pickles[:2])}), which can run code when they are "
        "read, so they are not. Save them as safetensors, where you trust them: transformers' "
        "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
    )
