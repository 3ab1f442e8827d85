"""A run's output folder: what is in it, whose it is, and where to go on from."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxllm.checkpoint.store import CheckpointStore
from jaxllm.convert.load import RUN_CHECKPOINTS, RUN_MODEL
from jaxllm.core.config import Section, dump, load
from jaxllm.core.errors import UserError
from jaxllm.core.versions import environment
from jaxllm.data.tokenizer import copy_tokenizer
from jaxllm.hf.config import parse_config, read_config, write_config
from jaxllm.hf.source import GENERATION_CONFIG
from jaxllm.models.base import LM
from jaxllm.train.config import Config

RESOLVED = "config.resolved.yaml"
METRICS = "metrics.jsonl"
EXPORT = "export/hf"

# What a run may not change when it goes on: the order of its data, or what its state means.
FIXED = ("seed", "model", "data", "optim", "train.batch_size", "train.param_dtype")
# Nor may a new run that goes on from a checkpoint of another.
FIXED_FROM_CHECKPOINT = ("seed", "model", "data", "optim.type", "train.param_dtype")


class Facts(Section):
    """What a checkpoint says beside the state."""

    step: int
    """updates done"""
    epoch: int
    position: int
    """rows of `epoch` that are behind"""
    tokens: int
    """real tokens seen"""
    data: str
    """which token store the rows are of"""


@dataclass(frozen=True)
class Resume:
    """Go on from a checkpoint of the folder `run`."""

    run: Path
    facts: Facts

    def restore(self, shapes: Any) -> Any:
        """The training state, with the shapes, dtypes and shardings of `shapes`."""
        store = CheckpointStore(self.run / RUN_CHECKPOINTS, read_only=True)
        state = store.restore(self.facts.step, shapes)
        store.close()
        return state

    def check(self, lm: LM, data: str, steps: int) -> None:
        """Raises UserError if what the config names is no longer what the checkpoint was trained with.

        data: the key of the token store, which covers the text and the tokenizer.
        """
        before = self.run / RUN_MODEL / "config.json"
        if parse_config(read_config(before.parent), before)[1] != lm.config:
            raise UserError(self._changed(f"the model's config (there: {before})"))
        if self.facts.data != data:
            raise UserError(self._changed("what data.sources hold, or the tokenizer,"))
        if self.facts.step > steps:
            raise UserError(
                f"the run has done {self.facts.step} steps ({self}), and the config asks for {steps}; raise "
                "train.steps or train.epochs, or choose a new output_dir"
            )

    def _changed(self, what: str) -> str:
        return (
            f"{what} has changed since {self} was written, so the run cannot go on. Put it back, or choose a new "
            f"output_dir; model.path={self} starts a new run from its weights"
        )

    def __str__(self) -> str:
        return str(self.run / RUN_CHECKPOINTS / str(self.facts.step))


def find_resume(config: Config) -> Resume | None:
    """Where the run goes on from; None for a new run.

    That is the newest checkpoint of its own folder, else the one that `checkpoint.resume` names. Raises UserError for
    an output folder that another run has written, or anything but a run.
    """
    folder, wanted = Path(config.output_dir), config.checkpoint.resume
    named = _named_checkpoint(config) if wanted not in ("auto", "none") else None
    _check_writable(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return named
    if not (folder / RESOLVED).is_file():
        raise UserError(
            f"output_dir {folder} holds {next(folder.iterdir()).name!r} and no {RESOLVED}, so it is not a run's "
            "folder; choose a new or empty one"
        )
    if wanted == "none":
        raise UserError(
            f"output_dir {folder} holds a run, and checkpoint.resume is none; choose a new folder, or "
            "checkpoint.resume=auto to go on with it"
        )
    _check_same(config, folder, FIXED if named is None else (*FIXED, "checkpoint.resume"))
    return _newest(folder) or named


def _check_writable(folder: Path) -> None:
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"output_dir {folder}: {existing} is a file; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output_dir {folder}: {existing} may not be written to; choose another folder")


def _newest(run: Path) -> Resume | None:
    if not (run / RUN_CHECKPOINTS).is_dir():
        return None
    store = CheckpointStore(run / RUN_CHECKPOINTS, read_only=True)
    step = store.latest()
    return None if step is None else _resume(run, store, step)


def _named_checkpoint(config: Config) -> Resume:
    path = Path(config.checkpoint.resume)
    run = path.parent.parent
    is_checkpoint = path.parent.name == RUN_CHECKPOINTS and path.name.isdigit() and path.is_dir()
    if not is_checkpoint or not (run / RESOLVED).is_file():
        raise UserError(
            f"checkpoint.resume: {path} is no checkpoint; give auto, none or a folder <run>/{RUN_CHECKPOINTS}/<step>"
        )
    # Batches of like length are made for one size, so their order does not go on in another.
    grouped = ("train.batch_size",) if config.data.packing == "grouped" else ()
    _check_same(config, run, (*FIXED_FROM_CHECKPOINT, *grouped))
    return _resume(run, CheckpointStore(path.parent, read_only=True), int(path.name))


def _resume(run: Path, store: CheckpointStore, step: int) -> Resume:
    facts = store.facts(step)
    store.close()
    try:
        return Resume(run, Facts(**facts))
    except ValidationError as error:
        written = store.folder / str(step)
        raise UserError(f"the checkpoint {written} was written by another version of jaxllm") from error


def _check_same(config: Config, run: Path, names: Sequence[str]) -> None:
    """Raises UserError unless `config` has the values of the run's own under each of `names`."""
    there, now = (_values(c.model_dump(mode="json")) for c in (load(run / RESOLVED, [], Config), config))
    changed = [
        f"{key} (there: {_short(there.get(key))}, now: {_short(now.get(key))})"
        for key in dict.fromkeys((*there, *now))
        if any(f"{key}.".startswith(f"{name}.") for name in names) and there.get(key) != now.get(key)
    ]
    if changed:
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"{run} holds a run with another config: {'; '.join(changed[:5])}{more}. Choose another output_dir, or go "
            f"on with the run's own settings ({run / RESOLVED}); model.path={run} starts a new run from its weights"
        )


def _values(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"data.sources.0.path": value}` of a config as plain data."""
    if isinstance(config, list):
        config = dict(enumerate(config))
    if not isinstance(config, dict):
        return {prefix: config}
    parts = (_values(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for part in parts for key, value in part.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"


def prepare(
    config: Config, lm: LM, tokenizer_folder: Path, special_ids: Mapping[str, int] | None, *, keep_model: bool
) -> None:
    """Writes what describes the run: the resolved config, the machine, and the model's config and tokenizer.

    keep_model: the run goes on, and the model's are there. Raises UserError if the folder cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RESOLVED, dump(config))
        _write(folder / "env.json", json.dumps({**environment(), "attention": lm.attention}, indent=2) + "\n")
        if not keep_model:
            _write_model(folder / RUN_MODEL, lm, tokenizer_folder, special_ids, config.train.param_dtype)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}; choose another") from error


def _write_model(
    folder: Path, lm: LM, tokenizer_folder: Path, special_ids: Mapping[str, int] | None, dtype: str
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_tokenizer(tokenizer_folder, folder)
    source = lm.source
    if source is not None and (source.folder / GENERATION_CONFIG).is_file():
        shutil.copyfile(source.folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    raw = source.config if source is not None else None
    raw = write_config(lm.family, lm.config, source=raw, dtype=dtype, special_ids=special_ids)
    _write(folder / "config.json", json.dumps(raw, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a killed run leaves the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)
