"""Checkpoints of a run: written in the background, complete or not there at all, readable on any mesh.

A checkpoint is a folder `<step>/` with the training state (`state`, Orbax) and facts about the run (`facts`, JSON).
Beside them, the text file `latest` names the newest complete one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from pydantic import Field, PositiveInt

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
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "facts"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._point_to_latest),
            ),
        )

    def save(self, step: int, state: Any, facts: Mapping[str, Any]) -> None:
        """Copies the state off the devices and returns; a background thread writes it. `facts` must be JSON."""
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), facts=ocp.args.JsonSave(dict(facts)))
        with _clear_errors(self.folder):
            self._manager.save(step, args=args)

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
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False
            )

        restore = ocp.args.PyTreeRestore(
            item=abstract, restore_args=jax.tree.map(argument, abstract), partial_restore=partial
        )
        return self._restore(step, state=restore)["state"]

    def wait(self) -> None:
        """Returns when everything saved so far is complete on disk."""
        with _clear_errors(self.folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and ends the background thread."""
        with _clear_errors(self.folder):
            self._manager.close()

    def _restore(self, step: int, **items: Any) -> Any:
        if step not in self._manager.all_steps():
            raise UserError(f"{self.folder} has no checkpoint {step}; it has {self._manager.all_steps()}")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, FileNotFoundError, OSError) as error:
            raise UserError(
                f"the checkpoint {self.folder / str(step)} cannot be read: {error}. "
                "Set checkpoint.resume to an older one to continue from there"
            ) from error

    def _point_to_latest(self) -> None:
        step = self._manager.latest_step()
        if step is not None:
            pointer = self.folder / "latest.tmp"
            pointer.write_text(f"{step}\n")
            pointer.rename(self.folder / "latest")


class _clear_errors:
    """Turns a failed write into one message."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"writing a checkpoint to {self.folder} failed: {error}. Free some space or lower checkpoint.keep; "
                "the checkpoints before it are complete, and the run resumes from the newest"
            ) from error
