"""Where a run goes on from, and whether it may."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from jaxllm.checkpoint.integrity import find_damage
from jaxllm.checkpoint.run_files import (
    MODEL_CONFIG,
    RESOLVED,
    RUN_CHECKPOINTS,
    RUN_MODEL,
    check_described,
    check_seal,
    check_sections,
    is_sealed,
    unsealed,
)
from jaxllm.checkpoint.store import Checkpoint, checkpoints, named_checkpoint
from jaxllm.core.config import OnResume, Section
from jaxllm.core.errors import UserError
from jaxllm.core.fit import Paddable
from jaxllm.data.rows.loader import HeldOutBy
from jaxllm.data.rows.old_store import old_key
from jaxllm.hf.config import parse_config, read_config
from jaxllm.models.family import FamilyConfig
from jaxllm.optim.build import build
from jaxllm.optim.config import OptimizerConfig
from jaxllm.peft import PeftConfig
from jaxllm.processes.distributed import is_first
from jaxllm.runs.config import Config
from jaxllm.runs.config_changes import Change, changes, harmless
from jaxllm.runs.folder import config_of, first_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Facts(Section):
    """What a checkpoint says beside the state."""

    step: int
    """updates done"""
    steps: int
    """updates that the run was to do"""
    epoch: int
    position: int
    """rows of `epoch` that are behind"""
    tokens: int
    """real tokens seen"""
    data: str
    """which token store the rows are of"""
    held_out_by: HeldOutBy = "samples"
    """how data.eval_fraction was drawn; earlier versions wrote none, and drew samples"""
    day: str | None = None
    """what chat templates were told that the date is, in ISO 8601; earlier versions wrote none"""


@dataclass(frozen=True)
class Resume:
    """Go on from `checkpoint`.

    notes: what is to be said of it. damaged: newer checkpoints of the same run, which go aside.
    """

    checkpoint: Checkpoint
    facts: Facts
    notes: tuple[str, ...]
    damaged: tuple[Checkpoint, ...] = ()

    @property
    def run(self) -> Path:
        """The folder of the run that wrote it."""
        return self.checkpoint.parent.parent

    @property
    def day(self) -> date:
        """What chat templates are told that the date is, since the run began."""
        if self.facts.day is not None:
            return date.fromisoformat(self.facts.day)
        return date.fromtimestamp((self.run / MODEL_CONFIG).stat().st_mtime)  # written when it began

    def restore(self, shapes: Any, paddable: Paddable) -> Any:
        """The training state, with the shapes, dtypes and shardings of `shapes`; its files have been verified.

        paddable: of the model, the parameters that another mesh may have padded.

        The damaged checkpoints are renamed to `<step>.damaged`.
        """
        state = self.checkpoint.restore(shapes, paddable=paddable)
        for damaged in self.damaged if is_first() else ():
            names = (f"{damaged.step}.damaged{again}" for again in ("", *(f".{i}" for i in range(2, 1000))))
            damaged.folder.rename(next(path for name in names if not (path := damaged.parent / name).exists()))
        return state

    def check(
        self, config: Config, model: FamilyConfig, data: str, tokenizer: PreTrainedTokenizerFast, steps: int
    ) -> list[str]:
        """What is to be said about going on. Raises UserError if what the config names is no longer what the
        checkpoint was trained with.

        data: the key of the token store, which covers the text and the tokenizer.
        """
        before = self.run / MODEL_CONFIG
        if parse_config(read_config(self.run / RUN_MODEL), before)[1] != model:
            raise UserError(self._changed(f"the model's config (there: {before})"))
        if self.facts.data != data and self.facts.data != old_key(config.data.sources, tokenizer, self.day):
            raise UserError(self._changed("what data.sources hold, or the tokenizer,"))
        if self.facts.step > steps:
            raise UserError(
                f"the run has done {self.facts.step} steps ({self}), and the config asks for {steps}; raise "
                "train.steps or train.epochs, or choose a new output_dir"
            )
        return [*self.notes, *self._schedule_note(config.optim, config.peft, steps)]

    def _schedule_note(self, optim: OptimizerConfig, method: PeftConfig, steps: int) -> list[str]:
        if steps == self.facts.steps:
            return []
        schedules = (build(optim, count)[1] for count in (self.facts.steps, steps))
        was, now = (float(np.asarray(schedule(self.facts.step))) for schedule in schedules)
        effect = "stays" if was == now else f"is {now:.3g} instead of {was:.3g}"
        also = method.follows_length
        ending = f"do its learning rate schedule and {also}" if also else "does its learning rate schedule"
        return [
            f"the run ends at step {steps} instead of {self.facts.steps}, and so {ending}: the rate after step "
            f"{self.facts.step} {effect}"
        ]

    def _changed(self, what: str) -> str:
        return (
            f"{what} has changed since {self} was written, so the run cannot go on. Put it back, or choose a new "
            f"output_dir; model.path={self} starts a new run from its weights"
        )

    def __str__(self) -> str:
        return str(self.checkpoint)


def find_resume(config: Config) -> Resume | None:
    """Where the run goes on from; None for a new run.

    That is the newest checkpoint of its own folder, else the one that `checkpoint.resume` names. An older one of its
    own folder may be named where all newer ones are damaged. Raises UserError for a damaged checkpoint, and for an
    output folder that another run has written, or anything but a run.
    """
    folder, wanted = Path(config.output_dir), config.checkpoint.resume
    named = None if wanted in ("auto", "none") else _named_checkpoint(wanted)
    if first_of(folder) is None:
        return None if named is None else _from_another(config, named)
    check_seal(folder)
    if not (folder / RESOLVED).is_file():
        raise UserError(
            f"output_dir {folder} holds {first_of(folder)!r} and no {RESOLVED}, so it is not a run's folder; choose a "
            "new or empty one, or put the file back if it was a run's"
        )
    check_sections(folder)
    if wanted == "none":
        raise UserError(
            f"output_dir {folder} holds a run, and checkpoint.resume is none; choose a new folder, or "
            "checkpoint.resume=auto to go on with it"
        )
    before = config_of(folder)
    found = _harmless(before, config, folder, OnResume.REFUSED, OnResume.NEW_FOLDER)
    notes = [f"changed, and harmless: {', '.join(map(str, found))}"] if found else []
    own = checkpoints(folder / RUN_CHECKPOINTS)
    if named is None or before.checkpoint.resume == wanted:  # if it was named then, it is behind
        newest = own[-1] if own else named
        if newest is None:
            return None
        return _resume(newest, notes) if own else _from_another(config, newest)
    if not own or not named.parent.samefile(folder / RUN_CHECKPOINTS):
        raise UserError(
            f"{folder} holds a run with another config: checkpoint.resume (there: {before.checkpoint.resume}, now: "
            f"{wanted}). Choose another output_dir, or checkpoint.resume=auto to go on with the run that is there"
        )
    newer = [checkpoint for checkpoint in own if checkpoint.step > named.step]
    if whole := [checkpoint for checkpoint in newer if find_damage(checkpoint.folder) is None]:
        raise UserError(
            f"checkpoint.resume is {wanted}, and output_dir {folder} has {whole[-1]}, which is newer and whole; set "
            "checkpoint.resume=auto to go on from the newest, or choose another output_dir"
        )
    return _resume(named, notes, newer)


def _named_checkpoint(wanted: str) -> Checkpoint:
    found = named_checkpoint(Path(wanted))
    if found is None or found.parent.name != RUN_CHECKPOINTS:
        raise UserError(
            f"checkpoint.resume: {wanted} is no checkpoint; give auto, none or <run>/{RUN_CHECKPOINTS}/<step>, or "
            "/best or /latest in place of the step"
        )
    return found


def _from_another(config: Config, named: Checkpoint) -> Resume:
    run = named.parent.parent
    check_described(run)
    found = _harmless(config_of(run), config, run, OnResume.REFUSED)
    notes = [f"changed since {named} was written: {', '.join(map(str, found))}"] if found else []
    return _resume(named, notes)


def _harmless(there: Config, now: Config, run: Path, *refused: OnResume) -> list[Change]:
    also = []
    if now.data.packing == "grouped":  # batches of like length are made for one size: their order is of that size
        also.append("train.batch_size")
    if there.train.scales_loss() != now.train.scales_loss():  # the scale is a part of the state
        also.append("train.compute_dtype")
    return harmless(changes(there, now), refused, str(run), str(run / RESOLVED), also=also)


def _resume(checkpoint: Checkpoint, notes: Sequence[str], damaged: Sequence[Checkpoint] = ()) -> Resume:
    run = checkpoint.parent.parent
    check_described(run)
    unknown = [] if is_sealed(run) else [unsealed(run)]
    begun = time.monotonic()
    checkpoint.verify()
    took = time.monotonic() - begun
    verified = [f"verifying the files of {checkpoint} took {took:.1f} s"] if took > 1 else []
    try:
        facts = Facts(**checkpoint.facts())
    except ValidationError as error:
        raise UserError(
            f"the checkpoint {checkpoint} was written by another version of jaxllm; finish the run with that version, "
            f"or choose a new output_dir and start from its weights with model.path={checkpoint}"
        ) from error
    return Resume(checkpoint, facts, (*unknown, *notes, *verified), tuple(damaged))
