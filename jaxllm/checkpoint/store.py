"""The checkpoints of a run, to read: each is complete or not there at all, and readable on any mesh.

A checkpoint is a folder `<step>/` with the training state (`state/`, Orbax), facts about the run (`facts.json`) and
the hashes of both (`SHA256SUMS`). Beside them, the text files `latest` and `best` name a step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxllm.checkpoint.integrity import find_damage
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.fit import Paddable, check_fits
from jaxllm.core.layer_order import rearranged
from jaxllm.processes.distributed import gather

STATE = "state"
FACTS = "facts.json"
POINTERS = ("latest", "best")
# What a run says of its model and method, from which the shapes of its state follow.
RUN_FILES = "model/config.json and config.resolved.yaml"


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

    def restore(self, abstract: Any, *, partial: bool = False, paddable: Paddable | None = None) -> Any:
        """The state with the shapes, dtypes and shardings of `abstract`, whatever mesh wrote it: its layers one behind
        the other.

        With `partial`, `abstract` may name a part of the state only. paddable: the parameters whose vocabulary another
        mesh may have padded differently, see `check_fits`; these are cut, or filled with zeros. Floats are cast. Raises
        UserError for a state with other leaves, or of other shapes.
        """
        self._check_leaves(set(tree.flatten(abstract)), partial)
        self._check_shapes(abstract, paddable or {})

        def argument(leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
            return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype, strict=False)

        arguments = ocp.args.PyTreeRestore(
            item=abstract, restore_args=jax.tree.map(argument, abstract), partial_restore=partial
        )
        with self._reading() as checkpointer:
            state = checkpointer.restore(self.folder / STATE, args=arguments)
        return rearranged(state, np.argsort(self._facts()["layer_order"]))

    def _facts(self) -> dict[str, Any]:
        try:
            facts = json.loads((self.folder / FACTS).read_text())
            return {name: facts[name] for name in ("run", "leaves", "jaxllm")} | {
                # What checkpoints of older versions lack.
                "layer_order": facts.get("layer_order", []),
                "paddable": facts.get("paddable", {}),
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
                f"the checkpoint {self} was written by another version of jaxllm ({facts['jaxllm']}), or for a run "
                f"whose files have changed since: {' and '.join(differences)}. Finish the run with that version, put "
                f"its {RUN_FILES} back, or choose a new output_dir and start from its weights with "
                f"model.path={self}"
            )

    def _check_shapes(self, abstract: Any, paddable: Paddable) -> None:
        with self._reading() as checkpointer:
            metadata: Any = checkpointer.metadata(self.folder / STATE)
        stored = tree.flatten(metadata.item_metadata.tree)
        wanted, what = tree.flatten(abstract), f"the checkpoint {self} does not fit the model"
        remedy = f"Put back the run's {RUN_FILES} as they were when it was written"
        for path, (_, size) in self._facts()["paddable"].items():
            if path in paddable and paddable[path][1] != size:
                raise UserError(
                    f"{what}: {path} has a vocabulary of {size}, and the model's is of {paddable[path][1]}. {remedy}"
                )
        found = {path: stored[path] for path in wanted if path in stored}
        check_fits(found, wanted, what=what, remedy=remedy, paddable=paddable, casts=True)

    @contextmanager
    def _reading(self) -> Iterator[ocp.Checkpointer]:
        """What reads the state. Raises UserError for files that it cannot read."""
        silence_orbax()
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                yield checkpointer
        except jax.errors.JaxRuntimeError:  # out of memory, which is no damage
            raise
        except Exception as error:  # Orbax raises nothing narrower for a file that it cannot read
            raise UserError(self._damaged(short_reason(error))) from error

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
