"""A run's output folder: what is in it, whose it is, and where to go on from."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm.checkpoint.store import CheckpointStore
from jaxllm.convert.load import RUN_CHECKPOINTS, RUN_MODEL
from jaxllm.core.config import dump, load
from jaxllm.core.errors import UserError
from jaxllm.core.versions import environment
from jaxllm.data.tokenizer import copy_tokenizer
from jaxllm.hf.config import write_config
from jaxllm.models.base import LM
from jaxllm.train.config import Config

RESOLVED = "config.resolved.yaml"

# What a run may not change when it goes on: the order of its data, or what its state means.
FIXED = ("seed", "model", "data", "optim", "train.batch_size", "train.param_dtype")


@dataclass(frozen=True)
class Resume:
    """Go on from checkpoint `step` in `checkpoints`."""

    checkpoints: Path
    step: int

    def __str__(self) -> str:
        return str(self.checkpoints / str(self.step))


def find_resume(config: Config) -> Resume | None:
    """Where the run goes on from; None for a new run.

    Raises UserError for an output folder that another run has written, or anything but a run.
    """
    folder = Path(config.output_dir)
    if config.checkpoint.resume not in ("auto", "none"):
        return _named_checkpoint(Path(config.checkpoint.resume))
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not (folder / RESOLVED).is_file():
        raise UserError(
            f"output_dir {folder} holds {next(folder.iterdir()).name!r} and no {RESOLVED}, so it is not a run's "
            "folder; choose a new or empty one"
        )
    if config.checkpoint.resume == "none":
        raise UserError(
            f"output_dir {folder} holds a run, and checkpoint.resume is none; choose a new folder, or "
            "checkpoint.resume=auto to go on with it"
        )
    _check_same_run(config, folder)
    store = (
        CheckpointStore(folder / RUN_CHECKPOINTS, read_only=True)
        if (folder / RUN_CHECKPOINTS).is_dir()
        else None
    )
    step = store.latest() if store else None
    return None if step is None else Resume(folder / RUN_CHECKPOINTS, step)


def _named_checkpoint(path: Path) -> Resume:
    if path.parent.name != RUN_CHECKPOINTS or not path.name.isdigit() or not path.is_dir():
        raise UserError(
            f"checkpoint.resume: {path} is no checkpoint; give auto, none or a folder <run>/{RUN_CHECKPOINTS}/<step>"
        )
    return Resume(path.parent, int(path.name))


def _check_same_run(config: Config, folder: Path) -> None:
    before = load(folder / RESOLVED, [], Config)
    changed = [
        f"{name} (there: {_short(old)}, now: {_short(new)})"
        for name in FIXED
        if (old := _at(before, name)) != (new := _at(config, name))
    ]
    if changed:
        raise UserError(
            f"output_dir {folder} holds a run with another config: {'; '.join(changed)}. Choose another output_dir, "
            f"or go on with the run's own settings ({folder / RESOLVED})"
        )


def _at(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"


def prepare(config: Config, lm: LM, tokenizer_folder: Path) -> Path:
    """Writes what describes the run: the resolved config, the machine, the model's config and tokenizer.

    Returns the output folder. Raises UserError if it cannot be written.
    """
    folder = Path(config.output_dir)
    try:
        (folder / RUN_CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        (folder / RESOLVED).write_text(dump(config))
        (folder / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
        model = folder / RUN_MODEL
        if not (model / "config.json").is_file():
            shutil.rmtree(model, ignore_errors=True)
            model.mkdir()
            copy_tokenizer(tokenizer_folder, model)
            raw = write_config(lm.family, lm.config, dtype=config.train.param_dtype)
            (model / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}; choose another") from error
    return folder
