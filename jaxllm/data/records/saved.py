"""Folders that `save_to_disk` of Hugging Face's `datasets` wrote: which of their files are the data."""

import json
from pathlib import Path
from typing import Any

from jaxllm.core.errors import UserError
from jaxllm.data.records.splits import Choice, pick

STATE = "state.json"
SPLITS = "dataset_dict.json"


def saved_files(folder: Path, wanted: Choice) -> list[str] | None:
    """The data files of a saved Dataset, or of one split of a saved DatasetDict; None for any other folder.

    `datasets` leaves its caches beside the data, in files of the same kind; only `state.json` tells them apart. Raises
    UserError for files of its own that are damaged, and for a data file that it names and that is missing.
    """
    if wanted.subset is not None and not (folder / STATE).is_file():
        folder = folder / wanted.subset
    splits = _read(folder / SPLITS)
    names: Any = splits.get("splits")
    if isinstance(names, list) and names:
        split = pick("split", dict.fromkeys(map(str, names)), wanted.split, "train", wanted.where)
        return _data_files(folder / split, wanted)
    state = _read(folder / STATE)
    if "_data_files" not in state:
        return None
    split = state.get("_split")
    if wanted.split is not None and wanted.split != split:
        raise UserError(f"{wanted.where} has the split {split} alone, and not {wanted.split}; remove `split`")
    return _data_files(folder, wanted)


def _data_files(folder: Path, wanted: Choice) -> list[str]:
    state = _read(folder / STATE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} holds a selection of rows beside all of them; save it again after `flatten_indices()`"
        )
    entries: Any = state.get("_data_files")
    named = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
    if not named or not all(isinstance(name, str) and name == Path(name).name for name in named):
        raise UserError(f"{folder / STATE} names no data files, or none of this folder; save the data set again")
    files = [folder / str(name) for name in named]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"{folder / STATE} names {len(files):,} data files, and {missing[0].name} is missing; copy the folder "
            f"again, or name the files that {wanted.where} has by a glob"
        )
    return [str(file) for file in files]


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file, or something else in it."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); copy it again, or name the data files by a glob") from error
    return found if isinstance(found, dict) else {}
