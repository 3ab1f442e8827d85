"""Checkpoints of a run: written in the background, complete or not there at all, readable on any mesh.

A checkpoint is a folder `<step>/` with the training state (`state`, Orbax) and facts about the run (`facts`, JSON).
Beside them, the text file `latest` names the newest complete one.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from pydantic import Field, PositiveInt

from jaxllm.checkpoint.integrity import check_sizes, damaged, write_sizes
from jaxllm.core.config import Section
from jaxllm.core.errors import UserError


class CheckpointConfig(Section):
    """When to save, and what to keep."""

    every: PositiveInt | None = None
    """steps between checkpoints; null: only at the end, and when the run is interrupted"""
    keep: PositiveInt = 2
    """how many of the newest stay"""
    resume: str = Field(default="auto", min_length=1)
    """auto: go on from the newest checkpoint of output_dir, if there is one; none: output_dir must be new;
    otherwise a folder <run>/checkpoints/<step> to go on from"""


class CheckpointStore:
    """The checkpoints in one folder.

    keep: how many of the newest stay. read_only: for a folder that a run may be writing to.
    """

    def __init__(self, folder: Path, *, keep: int | None = None, read_only: bool = False) -> None:
        logging.getLogger("absl").addFilter(_is_not_from_orbax)
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "facts"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )
        self._saving: int | None = None
        self._pointing: threading.Thread | None = None
        if not read_only and (newest := self.latest()) is not None:
            self._point_to(newest)  # a run that was killed may have missed it

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Copies the state off the devices and returns; a background thread writes it. `facts` must be JSON."""
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), facts=ocp.args.JsonSave(dict(facts)))
        self.wait()
        self._saving = step
        with self._write_errors():
            self._manager.save(step, args=args)
        self._pointing = threading.Thread(target=self._point_when_complete, args=(step,), daemon=True)
        self._pointing.start()

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def facts(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        return self._restore(step, facts=ocp.args.JsonRestore())["facts"]

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> Any:
        """The state of `step` with the shapes, dtypes and shardings of `abstract`, whatever mesh wrote it.

        A dimension that was padded differently (the vocabulary on another mesh) is cut or filled with zeros.
        With `partial`, `abstract` may name a part of the state only.
        """

        def argument(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False)

        restore = ocp.args.PyTreeRestore(
            item=abstract, restore_args=jax.tree.map(argument, abstract), partial_restore=partial
        )
        return self._restore(step, state=restore)["state"]

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk."""
        with self._write_errors():
            self._manager.wait_until_finished()
        if self._pointing is not None:
            self._pointing.join()

    def close(self) -> None:
        """Waits for the last save and ends the background threads."""
        self.wait()
        with self._write_errors():
            self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        if step not in self._manager.all_steps():
            raise UserError(f"{self.folder} has no checkpoint {step}; it has {self._manager.all_steps()}")
        check_sizes(self.folder / str(step))
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except jax.errors.JaxRuntimeError:  # out of memory, which is no damage
            raise
        except Exception as error:  # Orbax raises nothing narrower for a damaged file
            raise UserError(damaged(self.folder / str(step), _short(error))) from error

    def _seal(self) -> None:
        # Orbax calls this when everything is written, and renames the folder right after.
        (unfinished,) = self.folder.glob(f"{self._saving}.*")
        write_sizes(unfinished)

    def _point_when_complete(self, step: int) -> None:
        while not (complete := (self.folder / str(step)).is_dir()) and self._manager.is_saving_in_progress():
            time.sleep(0.01)
        if complete:
            self._point_to(step)

    def _point_to(self, step: int) -> None:
        pointer = self.folder / "latest.tmp"
        pointer.write_text(f"{step}\n")
        pointer.rename(self.folder / "latest")

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns what a disk refuses into one message; other errors pass."""
        try:
            yield
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's form of an OSError
            if not isinstance(error, OSError) and code is None:
                raise
            reason = os.strerror(int(code[1])) if code else _short(error)
            raise UserError(
                f"writing a checkpoint to {self.folder} failed: {reason}. Free some space or lower "
                "checkpoint.keep; the checkpoints before it are complete, and the run resumes from the newest"
            ) from error


def _short(error: Exception) -> str:
    """What Orbax says on one line, without tensorstore's description of its settings."""
    text = str(error).partition(" [tensorstore_spec")[0].partition(" See full TensorStore")[0]
    text = " ".join(text.split())
    return (text if len(text) <= 400 else text[:400] + "…").rstrip(".")


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    # It logs a failure many times over, each with a trace; all of them reach us as exceptions.
    return "/orbax/" not in record.pathname.replace("\\", "/")
