"""Writing checkpoints in the background, each complete or not there at all."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllm.checkpoint.integrity import write_sums
from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.checkpoint.store import FACTS, checkpoints, named_checkpoint, short_reason, silence_orbax
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.fit import Paddable
from jaxllm.core.host_memory import copied_on_host, waits_on_host


class Saved(NamedTuple):
    """A checkpoint that is complete.

    save_s: from the call of `save` until it was complete. blocked_s: how long that call took.
    """

    step: int
    save_s: float
    blocked_s: float


class CheckpointWriter:
    """Writes checkpoints into `folder`, which no other process writes to, and deletes those that need not stay.

    layer_order: which layer is at each place of the leaves of the layers, if they are not one behind the other.
    paddable: of the parameters that a mesh may pad, the axis and its real size.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        layer_order: np.ndarray | None = None,
        paddable: Paddable | None = None,
    ) -> None:
        silence_orbax()
        self._unraisable = sys.unraisablehook
        sys.unraisablehook = self._pass_unraisable
        self.folder = folder.absolute()
        self._config = config
        self._layout = {
            "layer_order": [] if layer_order is None else layer_order.tolist(),
            "paddable": dict(paddable or {}),
        }
        self._writes = jax.process_index() == 0
        self._sealing: dict[str, Any] = {}
        # No compression: weights hardly shrink, and the disk is faster than zstd.
        handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(state=handler),
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        self._background = ThreadPoolExecutor(max_workers=1)
        self._saving: Future[Saved] | None = None
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean_up()
            if steps := self._steps():
                self._point("latest", steps[-1])  # a run that was killed may have missed it

    def save(
        self, step: int, state: Any, facts: Mapping[str, Any], scores: Mapping[int, float] | None = None
    ) -> list[Saved]:
        """Copies the state off the devices and returns; background threads write it.

        The step after it may give away the state's buffers as soon as this returns. facts: plain JSON. scores: by
        step, the metric that `checkpoint.best` names. An earlier save that is still being written is waited for.
        Returns what `finished` would. Raises UserError if the disk refused that.
        """
        begun = time.monotonic()
        before = self.wait()
        self._sealing = {"run": dict(facts), "leaves": list(tree.flatten(state)), "jaxllm": metadata.version("jaxllm")}
        self._sealing |= self._layout
        with self._write_errors():
            arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(_on_host(state)))
            self._orbax.save(self.folder / str(step), args=arguments)
        blocked = time.monotonic() - begun
        self._saving = self._background.submit(self._complete, step, begun, blocked, dict(scores or {}))
        return before

    def finished(self) -> list[Saved]:
        """The save that has become complete since the last call, if any. Raises UserError if the disk refused it."""
        return self.wait() if self._saving is not None and self._saving.done() else []

    def wait(self) -> list[Saved]:
        """Returns when everything saved so far is complete, with what `finished` would."""
        if self._saving is None:
            return []
        saving, self._saving = self._saving, None
        with self._write_errors():
            return [saving.result()]

    def close(self) -> list[Saved]:
        """Waits for the last save, and ends the background threads; returns what `finished` would."""
        try:
            return self.wait()
        finally:
            self._background.shutdown()
            with self._write_errors():
                self._orbax.close()
            sys.unraisablehook = self._unraisable

    def _complete(self, step: int, begun: float, blocked: float, scores: Mapping[int, float]) -> Saved:
        try:
            self._orbax.wait_until_finished()
            if self._writes:
                self._retain(scores)
        except Exception:
            if self._writes:
                self._clean_up()  # gives back the space that the unfinished one takes
            raise
        return Saved(step, time.monotonic() - begun, blocked)

    def _seal(self) -> None:
        # Orbax calls this when the state is written, on the process that then renames the folder.
        (unfinished,) = self._unfinished()
        (unfinished / FACTS).write_text(json.dumps(self._sealing))
        write_sums(unfinished)

    def _retain(self, scores: Mapping[int, float]) -> None:
        steps = self._steps()
        self._point("latest", steps[-1])
        best = self._best({step: scores[step] for step in steps if step in scores})
        for step in {*steps} - self._config.kept(steps, best):
            going = self.folder / f"{step}.deleted"
            (self.folder / str(step)).rename(going)  # so that no half of it is ever seen
            shutil.rmtree(going)

    def _best(self, scores: Mapping[int, float]) -> int | None:
        """The step that the file `best` names, now."""
        pointer = self.folder / "best"
        best = self._config.best_of(scores)
        if best is not None:
            self._point("best", best)
        elif self._config.best is None:
            pointer.unlink(missing_ok=True)
        elif (named := named_checkpoint(pointer)) is not None:
            best = named.step
        return best

    def _steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in checkpoints(self.folder)]

    def _unfinished(self) -> list[Path]:
        return list(self.folder.glob("*.orbax-checkpoint-tmp*"))

    def _clean_up(self) -> None:
        for folder in (*self._unfinished(), *self.folder.glob("*.deleted")):
            shutil.rmtree(folder, ignore_errors=True)

    def _point(self, name: str, step: int) -> None:
        pointer = self.folder / f"{name}.tmp"
        pointer.write_text(f"{step}\n")
        pointer.replace(self.folder / name)

    def _pass_unraisable(self, unraisable: Any) -> None:
        # After one write of several has failed, Orbax leaves the others nobody to report to.
        if str(unraisable.exc_value) != "Event loop is closed":
            self._unraisable(unraisable)

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns what a disk refuses into one message; other errors pass."""
        try:
            yield
        except (OSError, ValueError) as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore's form of an OSError
            if not isinstance(error, OSError) and code is None:
                raise
            reason = os.strerror(int(code[1])) if code else short_reason(error)
            raise UserError(
                f"writing a checkpoint to {self.folder} failed: {reason}. Free some space or lower "
                "checkpoint.keep; the checkpoints before it are complete, and the run resumes from the newest"
            ) from error


def _on_host(state: Any) -> Any:
    """The state, copied where its buffers are the host's own: the next step could not have them while they are
    written. From other devices Orbax copies it."""

    def copy(leaf: jax.Array) -> jax.Array:
        if waits_on_host(leaf):
            return jax.block_until_ready(jax.jit(copied_on_host, out_shardings=leaf.sharding)(leaf))
        return leaf.copy() if next(iter(leaf.devices())).platform == "cpu" else leaf

    return jax.block_until_ready(jax.tree.map(copy, state))
