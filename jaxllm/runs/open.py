"""A model from whatever holds one: a Hugging Face folder, a run, or one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jax
from jax.typing import DTypeLike

from jaxllm.checkpoint.run_files import (
    MODEL_CONFIG,
    RESOLVED,
    RUN_CHECKPOINTS,
    RUN_MODEL,
    check_described,
    is_run,
    is_sealed,
    unsealed,
)
from jaxllm.checkpoint.store import Checkpoint, checkpoints, named_checkpoint
from jaxllm.core import tree
from jaxllm.core.console import note
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.fit import Paddable
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.data.text.tokenizer import load_tokenizer
from jaxllm.files import hub
from jaxllm.hf import load_params, read_model
from jaxllm.hf.config import parse_config, read_config
from jaxllm.models.fit_layout import fitted
from jaxllm.models.lm import LM
from jaxllm.optim.config import OptimizerConfig
from jaxllm.peft.files import EXPORTED_TO
from jaxllm.peft.merge import merge
from jaxllm.runs.folder import config_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class OpenModel:
    """A model that can be loaded: `load()` reads its parameters. folder: with its config.json and tokenizer."""

    lm: LM
    folder: Path
    load: Callable[[], Params]

    def check_whole(self) -> None:
        """Raises UserError for a run's model that has leaves of an adapter, which cannot be merged into it."""
        if self.lm.quantization is not None:
            run = self.folder.parent
            raise UserError(
                f"{run}: its base is stored in {self.lm.quantization}, into which nothing is merged; merge its adapter "
                f"into the model that it was trained on: python -m jaxllm.convert merge MODEL "
                f"{run / EXPORTED_TO} FOLDER"
            )
        if self.lm.extra:
            run = self.folder.parent
            raise UserError(
                f"{run}: has trained virtual tokens, which cannot be merged into the weights of a model; they are in "
                f"{run / EXPORTED_TO}, which HF peft loads, and model.adapter takes"
            )

    def check_lacks(self, adapter: str | Path) -> None:
        """Raises UserError for the adapter of the run that this is the model of: it is merged into it already."""
        run = self.folder.parent
        if self.folder.name != RUN_MODEL or not (run / RESOLVED).is_file():
            return
        own = run.resolve(), (run / EXPORTED_TO).resolve()
        if Path(adapter).resolve() in own and config_of(run).peft.files is not None:
            raise UserError(
                f"{adapter}: is merged into the model of {run} already; give the model that the run began with, or no "
                "adapter"
            )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer in `folder`. Raises UserError if it has a token that the model has no row for."""
        return fitting_tokenizer(self.folder, self.lm.config.vocab_size)


def fitting_tokenizer(folder: Path, rows: int) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, for a model whose embedding has so many rows. Raises UserError if they are too few."""
    tokenizer = load_tokenizer(folder)
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise UserError(
            f"the tokenizer {folder} has token ids up to {largest:,} and the model's embedding {rows:,} rows; "
            "use the model's own tokenizer, or set model.vocab_size of a new model"
        )
    return tokenizer


def open_model(
    path: str | Path,
    layout: Layout,
    param_dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
) -> OpenModel:
    """The model in `path`: a Hugging Face folder, a run's output folder (its newest checkpoint), a checkpoint
    (`<run>/checkpoints/<step>`, or `/best` or `/latest` in place of the step), a name of the Hub, or the URL of a
    Hugging Face folder.

    param_dtype: None = as it is stored. compute_dtype: None = bfloat16 on GPU, float32 on CPU. Raises UserError.
    """
    path = hub.model_folder(path, "weights")
    run, checkpoint = _run_of(path)
    if run is not None:
        if not is_sealed(run):
            note(unsealed(run))
        return _from_checkpoint(run, checkpoint, layout, param_dtype, compute_dtype)
    lm = read_model(path, layout, param_dtype, compute_dtype)
    return OpenModel(lm, path, lambda: load_params(lm))


def model_folder(path: str | Path, what: Literal["config", "tokenizer"]) -> Path:
    """The folder with the config.json or the tokenizer of the model in `path` (see `open_model`)."""
    folder = hub.model_folder(path, what)
    run, _ = _run_of(folder)
    return folder if run is None else run / RUN_MODEL


def _run_of(path: Path) -> tuple[Path | None, Checkpoint | None]:
    """The run that `path` is, or a checkpoint of, and that checkpoint; None for a Hugging Face folder.

    Raises UserError for no folder, and for a run whose files are not as they were written.
    """
    if path.parent.name == RUN_CHECKPOINTS and (named := named_checkpoint(path)) is not None:
        check_described(named.parent.parent)
        return named.parent.parent, named
    if not path.is_dir():
        raise UserError(
            f"{path}: there is no such folder; give a Hugging Face folder, a run, one of its checkpoints, or a model "
            "of the Hub as owner/name"
        )
    if is_run(path):
        check_described(path)
        return path, None
    return None, None


def _from_checkpoint(
    run: Path,
    checkpoint: Checkpoint | None,
    layout: Layout,
    param_dtype: DTypeLike | None,
    compute_dtype: DTypeLike | None,
) -> OpenModel:
    raw = read_config(run / RUN_MODEL)
    family, config = parse_config(raw, run / MODEL_CONFIG)
    stored = raw.get("torch_dtype") or raw.get("dtype")
    if stored not in DTYPES:
        raise UserError(f"{run / MODEL_CONFIG}: dtype is {stored!r}, and must be one of {', '.join(DTYPES)}")
    plain = fitted(family, config, layout, param_dtype or stored, compute_dtype)
    trained = config_of(run)
    adapted = replace(trained.peft.add(plain), quantization=trained.quantization)
    merges = trained.peft.merges and trained.quantization is None

    def load() -> Params:
        chosen = checkpoint or next(reversed(checkpoints(run / RUN_CHECKPOINTS)), None)
        if chosen is None:
            raise UserError(f"{run}: the run has no complete checkpoint yet")
        chosen.verify()
        state = chosen.restore(_where_they_are(chosen, adapted.abstract()), partial=True, paddable=adapted.paddable)
        leaves = {path: leaf for half in state.values() for path, leaf in tree.flatten(half).items()}
        params = tree.insert({}, leaves)
        if trained.optim.averages:
            params = _averaged(chosen, params, trained.optim, adapted.paddable)
        return merge(params) if merges else params

    return OpenModel(plain if merges else adapted, run / RUN_MODEL, load)


def _where_they_are(checkpoint: Checkpoint, shapes: Params) -> Params:
    """`shapes` of parameters, each below the half of the checkpoint that has it: the one that trained, or the other."""
    halves = ("params", "frozen")
    there = {path: half for half in halves for path in checkpoint.leaves(half)}
    wanted = {f"{there.get(path, halves[0])}/{path}": shape for path, shape in tree.flatten(shapes).items()}
    return tree.insert({}, wanted)


def _averaged(checkpoint: Checkpoint, params: Params, optimizer: OptimizerConfig, paddable: Paddable) -> Params:
    """What is evaluated of the parameters of a checkpoint."""
    part, leaves = f"opt_state/{optimizer.averages}", tree.flatten(params)

    def wanted(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, at_least_float32(leaf.dtype), sharding=leaf.sharding)

    shapes = {f"{part}/{path}": wanted(leaves[path]) for path in checkpoint.leaves(part) if path in leaves}
    state = checkpoint.restore(tree.insert({}, shapes), partial=True, paddable=paddable)
    kept = tree.flatten(state["opt_state"][optimizer.averages])
    evaluated = jax.jit(optimizer.evaluation_params)({path: leaves[path] for path in kept}, kept)
    return tree.insert({}, {**leaves, **evaluated})
