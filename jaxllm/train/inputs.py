"""What a config names to read: the rows to train on, and the held-out sets."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxllm.callbacks.evaluate import EvaluationSet
from jaxllm.core.console import Say
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.data.records.duplicates import refuse_overlaps
from jaxllm.data.records.left_out import left_out
from jaxllm.data.records.source import SourceConfig, find_files
from jaxllm.data.rows.loader import Arrays, HeldOutBy, Loader, plans
from jaxllm.data.rows.pack import PackPlan
from jaxllm.data.rows.preview import preview, require_ends
from jaxllm.data.rows.store import Store, Wanted
from jaxllm.files import hub
from jaxllm.processes.distributed import gather, is_first, require_same
from jaxllm.runs.config import Config, EvalConfig
from jaxllm.runs.train_config import Accumulation
from jaxllm.step.batch import BATCH_AXES, check_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Rows(NamedTuple):
    """Tokenized records, and how they are packed into rows."""

    store: Store
    plan: PackPlan


@dataclass(frozen=True)
class Inputs:
    """The rows to train on; the rows of each held-out set, by its name; the day that chat templates were given; and
    how the held-out records were drawn."""

    train: Rows
    held_out: Mapping[str, Rows]
    day: date
    held_out_by: HeldOutBy


def read_inputs(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    say: Say,
    day: date | None = None,
    held_out_by: HeldOutBy = "records",
) -> Inputs:
    """The data of the config, tokenized unless the cache has it, and packed. Says what there is, and shows a sample.

    day: what chat templates are told that the date is; default: the day on which the data were tokenized, or today.
    held_out_by: records, or samples for a run that an earlier version began, which keeps what it held out.
    Raises UserError for sources that overlap, and for a held-out set of which everything is trained on.
    """
    _say_files(config.data.sources, say)
    wanted = Wanted.of(config.data.sources, tokenizer, progress=is_first())
    if day is None:
        day = date.fromisoformat(gather(str(wanted.day()))[0])
    if wanted.dated:
        say("date", f"chat templates that ask for the date are told {day}")
    store = _open(wanted, day, say)
    if held_out_by == "records":
        refuse_overlaps(config.data.sources, wanted.files)
    plan, held_out_share = plans(config.data, store, config.seed, config.train.batch_size, held_out_by=held_out_by)
    say("data", store.summary)
    repeated, records = store.repeated
    if repeated:
        say("", f"{repeated:,} of {records:,} records say what an earlier one says")
    _say_notes(store, say)
    say("", plan)
    require_ends(store, plan)
    say("sample", preview(store, plan, tokenizer))
    held_out: dict[str, Rows] = {}
    for chosen in config.evals:
        source = chosen.source()
        if source is None:
            assert held_out_share is not None  # the config was checked
            held_out[chosen.name] = Rows(store, held_out_share)
            if held_out_by == "samples":
                _say_trained(_trained_too(store, held_out_share.piece_sample, store, plan), chosen.name, say)
            continue
        _say_files([source], say)
        own = _open(Wanted.of([source], tokenizer, progress=is_first()), day, say)
        data = config.data.model_copy(update={"sources": [source], "eval_fraction": 0.0})
        every = np.arange(len(own))
        trained = _trained_too(own, every, store, plan)
        if held_out_by == "samples":
            _say_trained(trained, chosen.name, say)
            trained[:] = False
        if trained.all():
            raise UserError(
                f"evals {chosen.name} ({source.path!r}): each of its records is trained on, too; name other records, "
                "or remove its path and hold out a share by data.eval_fraction"
            )
        among = every[~trained]
        own_plan, _ = plans(data, own, config.seed, config.train.batch_size, among=among)
        held_out[chosen.name] = Rows(own, own_plan)
        say("held out", f"{chosen.name}: {own.summary}")
        if trained.any():
            say("", f"without {trained.sum():,} of these samples, whose records are trained on, too")
        _say_notes(own, say)
    return Inputs(Rows(store, plan), held_out, day, held_out_by)


def _open(wanted: Wanted, day: date, say: Say) -> Store:
    """The token store of some sources: one of the same content in every process."""
    store = wanted.open(day, progress=is_first(), note=lambda text: say("note", text))
    require_same("the content of the data", store.folder.name)
    return store


def _trained_too(own: Store, samples: np.ndarray, store: Store, plan: PackPlan) -> np.ndarray:
    """bool: which of `samples` of the store `own` are of records that `plan` trains on, or that say the same."""
    trained = np.unique(plan.piece_sample)
    files = store.real_files
    places = own.places(files)[samples]
    return ((places > 0) & np.isin(places, store.places(files)[trained])) | np.isin(
        own.content[samples], store.content[trained]
    )


def _say_trained(trained: np.ndarray, name: str, say: Say) -> None:
    if trained.any():
        say(
            "note",
            f"{name}: {trained.sum():,} of {len(trained):,} held-out pieces are of records that are trained on, too, "
            "as this run began with a version that allowed it; a new run keeps them apart",
        )


def _say_notes(store: Store, say: Say) -> None:
    for note in store.summary.notes:
        say("note", note)


def _say_files(sources: Iterable[SourceConfig], say: Say) -> None:
    """Names the files that were chosen, or left out, where the config names a folder or a data set of the Hub."""
    for source in sources:
        files = find_files(source)
        if not glob.has_magic(source.path) and hub.shown(files[0]) != os.path.expanduser(source.path):
            more = f" and {len(files) - 1} more" if len(files) > 1 else ""
            say("files", f"{source.path}: {hub.shown(files[0])}{more}")
        if note := left_out(source.path):
            say("left out", note)


def training_loader(rows: Rows, layout: Layout, **options: Any) -> Loader[Mapping[str, jax.Array]]:
    """Batches to train on as global arrays of the layout, of which this host reads its own rows.

    `options` are those of `Loader`.
    """
    here = layout.local("batch", options["micro_batch_size"])
    return Loader(*rows, place=partial(_place, layout, BATCH_AXES), row_slice=here, **options)


def evaluation_sets(
    evals: Sequence[EvalConfig], held_out: Mapping[str, Rows], layout: Layout, accumulation: Accumulation
) -> list[EvaluationSet]:
    """The held-out sets `evals`, in batches of a micro-batch, or of some for the stages of a pipeline.

    Raises UserError for rows that do not divide over the devices that share them.
    """
    micro_batches, batch_size = accumulation
    if layout.stages > 1:  # no more than wait for their backward pass in training
        batch_size *= min(micro_batches, 2 * layout.stages - 1)
    for rows in held_out.values():
        for width in rows.plan.widths:  # some of which the rows to train on may not have
            check_length(width, layout)
    return [
        EvaluationSet(chosen.name, partial(_batches, held_out[chosen.name], layout, batch_size), chosen.every)
        for chosen in evals
    ]


def _batches(rows: Rows, layout: Layout, batch_size: int) -> Iterator[Mapping[str, jax.Array]]:
    loader = Loader(
        *rows,
        micro_batches=1,
        micro_batch_size=batch_size,
        place=lambda arrays: _place(layout, BATCH_AXES[1:], {name: a[0] for name, a in arrays.items()}),
        row_slice=layout.local("batch", batch_size),
        epochs=1,
        shuffle=False,
    )
    return (batch.arrays for batch in loader)


def _place(layout: Layout, axes: tuple[str, ...], arrays: Arrays) -> Mapping[str, jax.Array]:
    """Host arrays, of this host's rows with their whole length, as global arrays of the layout."""
    sharding = layout.sharding(*axes)

    def place(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, array[..., layout.local(axes[-1], array.shape[-1])])

    return {name: place(array) for name, array in arrays.items()}
