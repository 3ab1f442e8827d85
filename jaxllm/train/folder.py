"""A run's output folder: what describes the run in it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from jaxllm.convert.load import RESOLVED, RUN_MODEL
from jaxllm.core.config import dump
from jaxllm.core.distributed import is_first
from jaxllm.core.errors import UserError
from jaxllm.core.hub import pinned
from jaxllm.core.versions import environment
from jaxllm.data.source import find_files
from jaxllm.data.tokenizer import copy_tokenizer
from jaxllm.hf.config import read_json, write_config
from jaxllm.hf.source import GENERATION_CONFIG
from jaxllm.models.base import LM
from jaxllm.train.compiler import AUTOTUNED
from jaxllm.train.config import Config
from jaxllm.train.lock import LOCK

METRICS = "metrics.jsonl"


def first_of(folder: Path) -> str | None:
    """The name of something in `folder`; None if it holds nothing but the lock of the process that asks, and what the
    compiler left of a run that did not come to its first step.
    """
    names = (path.name for path in folder.iterdir() if path.name not in (LOCK, AUTOTUNED))
    return next(names, None) if folder.exists() else None


def prepare(
    config: Config,
    lm: LM,
    tokenizer_folder: Path,
    special_ids: Mapping[str, int] | None,
    *,
    chat_template: str | None,
    keep_model: bool,
) -> None:
    """Writes what describes the run: the resolved config, the machine, and the model's config and tokenizer.

    chat_template: what the tokenizer gets in place of its own; None: it keeps its own. keep_model: the run is resumed,
    and the model's files are present. Of several processes, process 0 writes. Raises UserError if the folder cannot be
    written.
    """
    if not is_first():
        return
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / RESOLVED, dump(config))
        hub = _read_from_hub(config, lm, tokenizer_folder)
        _write(
            folder / "env.json", json.dumps({**environment(), "attention": lm.attention, "hub": hub}, indent=2) + "\n"
        )
        if not keep_model:
            _write_model(folder / RUN_MODEL, lm, tokenizer_folder, special_ids, config.train.param_dtype)
            if chat_template is not None:
                _write(folder / RUN_MODEL / "chat_template.jinja", chat_template)
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}; choose another") from error


def _read_from_hub(config: Config, lm: LM, tokenizer_folder: Path) -> list[str]:
    """The names and commits of what the run reads of the Hub."""
    evals = (held_out.source() for held_out in config.evals)
    sources = filter(None, (*config.data.sources, *evals))
    paths = [lm.source.folder] if lm.source else []
    paths += [tokenizer_folder, *(file for source in sources for file in find_files(source))]
    return sorted({name for path in paths if (name := pinned(path)) is not None})


def _write_model(
    folder: Path, lm: LM, tokenizer_folder: Path, special_ids: Mapping[str, int] | None, dtype: str
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy_tokenizer(tokenizer_folder, folder)
    source = lm.source
    generation = source.folder / GENERATION_CONFIG if source is not None else None
    before = read_json(generation) if generation is not None and generation.is_file() else {}
    if settings := {**before, **(special_ids or {})}:
        _write(folder / GENERATION_CONFIG, json.dumps(settings, indent=2) + "\n")
    raw = source.config if source is not None else None
    raw = write_config(lm.family, lm.config, source=raw, dtype=dtype, special_ids=special_ids)
    _write(folder / "config.json", json.dumps(raw, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a killed run leaves the old one or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)
