"""A run's output folder: what describes the run in it."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.checkpoint.run_files import (
    AUTOTUNED,
    ENVIRONMENT,
    EXPORT,
    LOCK,
    RESOLVED,
    RUN_MODEL,
    begin_run,
    unfinished,
    update_run,
)
from jaxllm.core.config import dump, load
from jaxllm.core.errors import UserError
from jaxllm.core.versions import environment
from jaxllm.data.records.source import SourceConfig, find_files
from jaxllm.files.hub import GENERATION_CONFIG, TOKENIZER_FILES, pinned
from jaxllm.files.side_files import read_side_files
from jaxllm.hf.config import write_config
from jaxllm.models.lm import LM
from jaxllm.processes.distributed import is_first
from jaxllm.runs.config import Config, EvalConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def first_of(folder: Path) -> str | None:
    """The name of something in `folder`; None if it holds nothing but the lock of the process that asks, and what was
    left of a run that did not come to its first step.
    """
    names = (path.name for path in folder.iterdir() if path.name not in (LOCK, AUTOTUNED, unfinished(RESOLVED)))
    return next(names, None) if folder.exists() else None


def config_of(run: Path) -> Config:
    """The config of the run in the folder `run`. Raises UserError for one that this version does not know."""
    try:
        return load(run / RESOLVED, [], Config)
    except UserError as error:
        raise UserError(
            f"{run} holds a run of another version of jaxllm, whose config this one does not know: {error}. Use that "
            f"version, or load what the run exported ({run / EXPORT})"
        ) from error


def prepare(
    config: Config,
    lm: LM,
    tokenizer_folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    *,
    chat_template: str | None,
    keep_model: bool,
) -> None:
    """Writes what describes the run: the resolved config, the machine, and the model's config and tokenizer.

    tokenizer: the one in `tokenizer_folder`. chat_template: what it gets in place of its own; None: it keeps its own.
    keep_model: the run is resumed, and the model's files are present. Only process 0 writes. Raises UserError if the
    folder cannot be written, and, before anything is written, for a damaged file of the tokenizer.
    """
    if not is_first():
        return
    folder = Path(config.output_dir)
    hub = _read_from_hub(config.data.sources, config.evals, lm, tokenizer_folder)
    files = {
        RESOLVED: dump(config).encode(),
        ENVIRONMENT: _json({**environment(), "attention": lm.attention, "hub": hub}),
    }
    own = lm.source is not None and tokenizer_folder == lm.source.folder
    special_ids = None if own else _special_ids(tokenizer)
    model = {} if keep_model else _model_files(lm, tokenizer_folder, special_ids, config.train.param_dtype)
    if model and chat_template is not None:
        model["chat_template.jinja"] = chat_template.encode()
    files |= {f"{RUN_MODEL}/{name}": content for name, content in model.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if keep_model:
            update_run(folder, files)
        else:
            begin_run(folder, files)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}; choose another") from error


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raises UserError in place of the operating system's error when the disk of the run in `folder` is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"output_dir {folder} cannot be written: {error.strerror}. Free some space; the same command goes on from "
            "the newest checkpoint"
        ) from error


def _read_from_hub(
    sources: Iterable[SourceConfig], evals: Iterable[EvalConfig], lm: LM, tokenizer_folder: Path
) -> list[str]:
    """The names and commits of what the run reads of the Hub."""
    sources = filter(None, (*sources, *(held_out.source() for held_out in evals)))
    paths = [lm.source.folder] if lm.source else []
    paths += [tokenizer_folder, *(file for source in sources for file in find_files(source))]
    return sorted({name for path in paths if (name := pinned(path)) is not None})


def _model_files(lm: LM, tokenizer_folder: Path, special_ids: Mapping[str, int] | None, dtype: str) -> dict[str, bytes]:
    """The model's config.json, tokenizer and settings of generation, by their names."""
    files, source = read_side_files(tokenizer_folder, TOKENIZER_FILES), lm.source
    before = read_side_files(source.folder, [GENERATION_CONFIG]) if source is not None else {}
    if settings := {**json.loads(before.get(GENERATION_CONFIG, "{}")), **(special_ids or {})}:
        files[GENERATION_CONFIG] = _json(settings)
    raw = source.config if source is not None else None
    files["config.json"] = _json(write_config(lm.family, lm.config, source=raw, dtype=dtype, special_ids=special_ids))
    return files


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: value for name, value in ids.items() if value is not None}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
