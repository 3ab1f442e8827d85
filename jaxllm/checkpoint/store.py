"""The checkpoints of a run, to read: each is complete or not there at all, and readable on any mesh.

A checkpoint is a folder `<step>/` with the training state (`state/`, Orbax), facts about the run (`facts.json`) and
the hashes of both (`SHA256SUMS`). Beside them, the text files `latest` and `best` name a step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllm.checkpoint.integrity import find_damage
from jaxllm.core import tree
from jaxllm.core.distributed import gather
from jaxllm.core.errors import UserError
from jaxllm.core.layers import rearranged

STATE = "state"
FACTS = "facts.json"
POINTERS = ("latest", "best")


def checkpoints(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and path.is_dir())
    return [Checkpoint(folder.absolute(), step) for step in steps]


def named_checkpoint(path: Path) -> Checkpoint | None:
    """What `path` names: `<folder>/<step>`, or one of the files `<folder>/latest` and `<folder>/best`."""
    if path.name in POINTERS and path.is_file():
        step = path.read_text(errors="replace").strip()
        if not step.isdecimal():  # a damaged one
            return None
        path = path.with_name(step)
    is_one = path.name.isdigit() and path.is_dir()
    return Checkpoint(path.parent.absolute(), int(path.name)) if is_one else None


@dataclass(frozen=True)
class Checkpoint:
    """The complete checkpoint of `step` in `parent`."""

    parent: Path
    step: int

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self.parent / str(self.step)

    def __str__(self) -> str:
        return str(self.folder)

    def verify(self) -> None:
        """Raises UserError unless every file is as it was written, naming the file and a checkpoint that is whole.

        Every process must call it: each reads a part of the files.
        """
        damages = gather(find_damage(self.folder, jax.process_index(), jax.process_count()) or "")
        if damage := next(filter(None, damages), None):
            raise UserError(self._damaged(damage))

    def facts(self) -> dict[str, Any]:
        """What the run said beside the state."""
        return self._facts()["run"]

    def leaves(self, part: str) -> list[str]:
        """The paths of the arrays in a part of the state."""
        return [path.removeprefix(f"{part}/") for path in self._facts()["leaves"] if path.startswith(f"{part}/")]

    def shapes(self, paths: Iterable[str]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """The shape and dtype of some arrays of the state, by their paths."""
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            described = checkpointer.metadata(self.folder / STATE).item_metadata.tree
        found = {path: tree.at(described, path) for path in paths}
        return {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in found.items()}

    def restore(self, abstract: Any, *, partial: bool = False) -> Any:
        """The state with the shapes, dtypes and shardings of `abstract`, whatever mesh wrote it: its layers one behind
        the other.

        A dimension that was padded differently (the vocabulary on another mesh) is cut or filled with zeros.
        With `partial`, `abstract` may name a part of the state only. Raises UserError for a state with other leaves.
        """
        self._check_leaves(set(tree.flatten(abstract)), partial)

        def argument(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False)

        arguments = ocp.args.PyTreeRestore(
            item=abstract, restore_args=jax.tree.map(argument, abstract), partial_restore=partial
        )
        silence_orbax()
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                state = checkpointer.restore(self.folder / STATE, args=arguments)
        except jax.errors.JaxRuntimeError:  # out of memory, which is no damage
            raise
        except Exception as error:  # Orbax raises nothing narrower for a file that it cannot read
            raise UserError(self._damaged(short_reason(error))) from error
        return rearranged(state, np.argsort(self._facts()["layer_order"]))

    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads((self.folder / FACTS).read_text())
            return {name: facts[name] for name in ("run", "leaves", "jaxllm")} | {
                "layer_order": facts.get("layer_order", [])
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(self._damaged(f"{FACTS} is missing or unreadable")) from error

    def _check_leaves(self, wanted: set[str], partial: bool) -> None:
        facts = self._facts()
        there = set(facts["leaves"])
        lacks, knows_not = sorted(wanted - there), [] if partial else sorted(there - wanted)
        differences = [
            f"it {verb} {leaves[0]}{f' and {len(leaves) - 1} more' if leaves[1:] else ''}"
            for verb, leaves in (("lacks", lacks), ("has the unknown", knows_not))
            if leaves
        ]
        if differences:
            raise UserError(
                f"the checkpoint {self} was written by another version of jaxllm ({facts['jaxllm']}): "
                f"{' and '.join(differences)}. Finish the run with that version, or choose a new output_dir and start "
                f"from its weights with model.path={self}"
            )

    def _damaged(self, what: str) -> str:
        """The message about a checkpoint that cannot be used."""
        older = [other for other in checkpoints(self.parent) if other.step < self.step]
        whole = next((other for other in reversed(older) if find_damage(other.folder) is None), None)
        offer = (
            "No older checkpoint beside it is whole; choose a new output_dir"
            if whole is None
            else f"The newest older one that is whole is {whole}: name it instead. checkpoint.resume={whole} goes on "
            "from there in the same output_dir, and moves the damaged one aside"
        )
        return f"the checkpoint {self} is damaged: {what}. {offer}"


def short_reason(error: Exception) -> str:
    """What Orbax says on one line, without tensorstore's description of its settings."""
    text = str(error).partition(" [tensorstore_spec")[0].partition(" See full TensorStore")[0]
    text = " ".join(text.split())
    return (text if len(text) <= 400 else text[:400] + "…").rstrip(".")


def silence_orbax() -> None:
    """Keeps Orbax's own log off the terminal: it logs a failure many times over, each with a trace, and all of them
    reach us as exceptions."""
    logging.getLogger("absl").addFilter(_is_not_from_orbax)


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname.replace("\\", "/")
