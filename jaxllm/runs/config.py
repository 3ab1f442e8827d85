"""The root of a run's config: it composes the sections that live beside the code they configure."""

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, PositiveInt, field_validator, model_validator

from jaxllm.callbacks.base import CALLBACKS, CallbackConfig
from jaxllm.callbacks.log import MetricsConfig
from jaxllm.callbacks.tensorboard import TensorBoardConfig
from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.core.config import ByType, Conflict, OnResume, Section
from jaxllm.core.errors import did_you_mean
from jaxllm.core.mesh import MeshConfig
from jaxllm.data.records.source import RecordsConfig, SourceConfig
from jaxllm.data.rows.loader import DataConfig
from jaxllm.models.quantized import Quantization
from jaxllm.optim.build import OPTIMIZERS
from jaxllm.optim.config import OptimizerConfig
from jaxllm.peft import METHODS, Full, PeftConfig
from jaxllm.processes.watch import DistributedConfig
from jaxllm.runs.model_config import NEW_MODELS, ModelConfig, PretrainedModel
from jaxllm.runs.train_config import TrainConfig
from jaxllm.runs.train_conflicts import pipeline_conflicts, step_conflicts


class EvalConfig(RecordsConfig):
    """A held-out set."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """what it is called in the log"""
    path: str | None = Field(default=None, min_length=1)
    """its records, as in data.sources; default: the share that data.eval_fraction holds out"""
    every: PositiveInt
    """steps between evaluations; there is one before the first step and one after the last, too"""

    def source(self) -> SourceConfig | None:
        """The source of its records; None for the held-out share."""
        options: dict[str, Any] = self.model_dump(exclude={"name", "every"})
        return None if self.path is None else SourceConfig(**options)


class Config(Section):
    """One training run."""

    output_dir: Annotated[str, OnResume.FREE] = Field(min_length=1)
    """the folder that the run writes"""
    seed: int = Field(default=0, ge=0, lt=2**32)  # JAX keeps 32 bits of a seed, and drops the others without a word
    """of new weights, of the order of the data and of what is held out"""
    model: Annotated[ModelConfig, ByType(NEW_MODELS, otherwise=PretrainedModel)]
    data: DataConfig
    mesh: Annotated[MeshConfig, OnResume.NOTED] = MeshConfig()
    distributed: Annotated[DistributedConfig, OnResume.FREE] = DistributedConfig()
    optim: Annotated[OptimizerConfig, ByType(OPTIMIZERS), OnResume.NEW_FOLDER]
    peft: Annotated[PeftConfig, ByType(METHODS)] = Full(type="full")
    train: TrainConfig
    checkpoint: Annotated[CheckpointConfig, OnResume.NOTED] = CheckpointConfig()
    evals: Annotated[list[EvalConfig], OnResume.NOTED] = Field(default_factory=list)
    """held-out sets, on which the model is measured as it trains"""
    metrics: Annotated[MetricsConfig, OnResume.NOTED] = MetricsConfig()
    callbacks: Annotated[list[Annotated[CallbackConfig, ByType(CALLBACKS)]], OnResume.NOTED] = Field(
        default_factory=lambda: [TensorBoardConfig()]
    )
    """what else sees the run; [] for nothing"""

    @field_validator("output_dir")
    @classmethod
    def _on_a_disk(cls, folder: str) -> str:
        if "://" in folder:
            raise ValueError(f"{folder} is a URL, and a run is written to a disk; give a folder")
        return folder

    @property
    def quantization(self) -> Quantization | None:
        """How the matrices of the layers are stored; None = as they are."""
        return self.model.quantization

    @model_validator(mode="after")
    def _compatible(self) -> "Config":
        for conflict in conflicts(self):
            raise ValueError(str(conflict))
        return self


def conflicts(config: Config) -> Iterator[Conflict]:
    """Every pair of settings that contradict each other; the first one is the message of a config that has several."""
    model, optim, peft, train = config.model, config.optim, config.peft, config.train
    if model.is_new:
        yield from peft.conflicts_with_new_model()
    yield from optim.conflicts(peft.rates())
    yield from step_conflicts(train, optim, peft)
    if config.quantization is not None:
        yield from peft.conflicts_with_quantization(config.quantization)
    yield from model.conflicts()
    yield from peft.conflicts(optim, train)
    yield from pipeline_conflicts(train, config.mesh, peft)
    yield from peft.conflicts_with_mesh(config.mesh)
    yield from _eval_conflicts(config)
    yield from _best_conflicts(config)


def _eval_conflicts(config: Config) -> Iterator[Conflict]:
    """What contradicts `evals`: they share the held-out part of the data, and each has a name of its own."""
    names = [held_out.name for held_out in config.evals]
    share = [held_out.name for held_out in config.evals if held_out.path is None]
    if share and not config.data.eval_fraction:
        yield Conflict(
            f"evals {share} have no path, and data.eval_fraction holds nothing out",
            "give them a path or set data.eval_fraction",
        )
    if config.data.eval_fraction and not share:
        yield Conflict(
            f"data.eval_fraction holds out {config.data.eval_fraction} of the data, and nothing evaluates it",
            "add {name: held_out, every: 100} to evals",
        )
    if len(set(names)) < len(names):
        yield Conflict(f"evals share a name: {names}", "give each its own")


def _best_conflicts(config: Config) -> Iterator[Conflict]:
    """What contradicts `checkpoint.best`: every checkpoint must have a value of the metric."""
    best, every = config.checkpoint.best, config.checkpoint.every
    if best is None or every is None:
        return
    metrics = {
        f"eval/{held_out.name}/{value}": held_out for held_out in config.evals for value in ("loss", "perplexity")
    }
    if best not in metrics:
        known = f"choose one of {', '.join(metrics)}" if metrics else "add the set to evals"
        yield Conflict(
            f"checkpoint.best is {best}, which no set of evals gives", f"{known}.{did_you_mean(best, metrics)}"
        )
        return
    between = metrics[best].every
    below, above = every // between * between, -(-every // between) * between
    nearest = " or ".join(str(count) for count in (below, above) if count)
    if every % between != 0:
        yield Conflict(
            f"checkpoint.best compares the checkpoints by {best}, which is evaluated every {between} steps, and "
            f"checkpoint.every is {every}: some would have no value",
            f"set checkpoint.every to {nearest}, or the set's every to a divisor of {every}",
        )
