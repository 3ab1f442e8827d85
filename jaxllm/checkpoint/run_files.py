"""The files of a run, by name in its folder, and the seal over those that describe it.

The run is described by its config, the machine, and its model's config and tokenizer. The seal is the `SHA256SUMS` of
the folder. It does not cover what changes at every step, and checkpoints have their own.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxllm.checkpoint.integrity import SUMS, digest_of, digests_of, find_damage, read_sums, sums_content
from jaxllm.core.config.yaml_file import ConfigFile
from jaxllm.core.errors import UserError

RESOLVED = "config.resolved.yaml"  # the whole config of a run
ENVIRONMENT = "env.json"
RUN_MODEL = "model"  # config.json and the tokenizer: an HF folder without weights
MODEL_CONFIG = f"{RUN_MODEL}/config.json"
RUN_CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
EXPORT = "export"
LOCK = "run.lock"
AUTOTUNED = "autotune"  # which kernels were timed to be the fastest, so that a resumed run takes the same ones

# What each resolved config has had from the beginning.
SECTIONS = (
    *("output_dir", "seed", "model", "data", "mesh", "distributed", "optim", "peft", "train", "checkpoint", "evals"),
    *("metrics", "callbacks"),
)


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run's, whole or damaged."""
    if (folder / RESOLVED).exists() or (folder / MODEL_CONFIG).is_file():
        return True
    return (folder / RUN_CHECKPOINTS).is_dir() and not (folder / "config.json").is_file()


def unfinished(name: str) -> str:
    """What a file of a run is called until all of it is written."""
    return f".{name}.new"


def is_sealed(run: Path) -> bool:
    """Whether the run has a seal, good or not. Runs of older versions have none."""
    return os.path.lexists(run / SUMS)


def unsealed(run: Path) -> str:
    """What is to be said of a run without a seal."""
    return (
        f"{run} has no {SUMS} (it was deleted, or an older version wrote the run), so whether its config, model config "
        "and tokenizer are as they were written is unknown"
    )


def check_seal(run: Path) -> None:
    """Raises UserError, naming file and remedy, if the run has a seal and a file is not as the run wrote it."""
    if is_sealed(run) and (damage := find_damage(run)) is not None:
        raise UserError(
            f"the run {run} is damaged: {damage}. Put the file back from a copy of the run. If all files are right as "
            f"they are, delete {run / SUMS}: they are then taken unchecked, and a resume seals them anew"
        )


def check_described(run: Path) -> None:
    """Raises UserError unless the run has what describes its model, as it was written if there is a seal."""
    check_seal(run)
    for name in (RESOLVED, MODEL_CONFIG):
        if not (run / name).is_file():
            what = "is a folder" if (run / name).is_dir() else "is missing"
            raise UserError(
                f"the run {run} is damaged: {name} {what}. Put the file back from a copy of the run, or load what the "
                f"run exported ({run / EXPORT})"
            )
    check_sections(run)


def check_sections(run: Path) -> None:
    """Raises UserError if the config of the run lacks a section, for which a default is not what was trained."""
    there = ConfigFile.read(run / RESOLVED).data
    if lost := [name for name in SECTIONS if name not in there]:
        raise UserError(
            f"{run / RESOLVED}: lacks {', '.join(lost)}, which every run writes: the file was cut or changed. Put it "
            "back from a copy of the run"
        )


def begin_run(run: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files, and the seal over them, of a run that has no checkpoint yet.

    A kill leaves a run without a seal, which begins anew.
    """
    (run / SUMS).unlink(missing_ok=True)
    shutil.rmtree(run / RUN_MODEL, ignore_errors=True)
    _write(run, files)
    _seal(run, _sums(files))


def update_run(run: Path, files: Mapping[str, bytes]) -> None:
    """Replaces some of the files of a run, which was checked, and its seal; a run without one gets it.

    A kill leaves the old or the new content of each file. The seal that is there meanwhile knows both.
    """
    before, new = read_sums(run) if is_sealed(run) else _found(run), _sums(files)
    _seal(run, {name: before[name] | new.get(name, set()) for name in before})
    _write(run, files)
    _seal(run, before | new)


def _found(run: Path) -> dict[str, set[str]]:
    paths = [run / RESOLVED, run / ENVIRONMENT, *sorted((run / RUN_MODEL).glob("[!.]*"))]
    found = digests_of(path for path in paths if path.is_file())
    return {path.relative_to(run).as_posix(): {digest} for path, digest in found}


def _sums(files: Mapping[str, bytes]) -> dict[str, set[str]]:
    return {name: {digest_of(content)} for name, content in files.items()}


def _write(run: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        _replace(run / name, content)


def _seal(run: Path, sums: Mapping[str, set[str]]) -> None:
    _replace(run / SUMS, sums_content(sums))


def _replace(path: Path, content: bytes) -> None:
    """Replaces a file in one step, on the disk too, so that a kill or a power failure leaves the old or the new one."""
    new = path.with_name(unfinished(path.name))
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
