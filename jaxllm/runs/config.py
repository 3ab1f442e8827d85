"""The root of a run's config: it composes the sections that live beside the code they configure."""

from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from jaxllm.callbacks.base import CALLBACKS, CallbackConfig
from jaxllm.callbacks.log import MetricsConfig
from jaxllm.callbacks.tensorboard import TensorBoardConfig
from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.core.config import ByType, Section
from jaxllm.core.errors import did_you_mean
from jaxllm.core.mesh import MeshConfig
from jaxllm.data.records.source import RecordsConfig, SourceConfig
from jaxllm.data.rows.loader import DataConfig
from jaxllm.models.quantized import Quantization
from jaxllm.optim.build import OPTIMIZERS
from jaxllm.optim.config import OptimizerConfig
from jaxllm.peft import METHODS, Full, PeftConfig
from jaxllm.peft.adalora import AdaLora
from jaxllm.peft.files import AdapterConfig
from jaxllm.peft.lisa import Lisa
from jaxllm.peft.lora import Lora
from jaxllm.peft.prefix import PrefixTuning
from jaxllm.peft.prompt import VirtualTokens
from jaxllm.processes.watch import DistributedConfig
from jaxllm.runs.model_config import NEW_MODELS, ModelConfig, NewModel, PretrainedModel
from jaxllm.runs.train_config import TrainConfig


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

    output_dir: str = Field(min_length=1)
    """the folder that the run writes"""
    seed: int = Field(default=0, ge=0, lt=2**32)  # JAX keeps 32 bits of a seed, and drops the others without a word
    """of new weights, of the order of the data and of what is held out"""
    model: Annotated[ModelConfig, ByType(NEW_MODELS, otherwise=PretrainedModel)]
    data: DataConfig
    mesh: MeshConfig = MeshConfig()
    distributed: DistributedConfig = DistributedConfig()
    optim: Annotated[OptimizerConfig, ByType(OPTIMIZERS)]
    peft: Annotated[PeftConfig, ByType(METHODS)] = Full(type="full")
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evals: list[EvalConfig] = Field(default_factory=list)
    """held-out sets, on which the model is measured as it trains"""
    metrics: MetricsConfig = MetricsConfig()
    callbacks: list[Annotated[CallbackConfig, ByType(CALLBACKS)]] = Field(default_factory=lambda: [TensorBoardConfig()])
    """what else sees the run; [] for nothing"""

    @property
    def quantization(self) -> Quantization | None:
        """How the matrices of the layers are stored; None = as they are."""
        return None if isinstance(self.model, NewModel) else self.model.quantization

    @model_validator(mode="after")
    def _compatible(self) -> "Config":
        for problem, remedy in check_compatible(self):
            raise ValueError(f"{problem}; {remedy}")
        return self


def check_compatible(config: Config) -> list[tuple[str, str]]:
    """Every pair of settings that contradict each other, as `(problem, remedy)`."""
    names = [held_out.name for held_out in config.evals]
    share = [held_out.name for held_out in config.evals if held_out.path is None]
    train = config.train
    table = [
        (
            isinstance(config.model, NewModel) and isinstance(config.peft, AdapterConfig),
            f"peft.type is {config.peft.type}, whose result is the adapter of a pretrained model, and model is new",
            "give model.path, or remove the peft section",
        ),
        (
            bool(config.optim.averages) and bool(config.peft.rates()),
            f"peft.loraplus_lr_ratio scales updates, and the averages of optim {config.optim.type} would not follow",
            "set loraplus_lr_ratio to 1, or choose another optimizer",
        ),
        (
            train.update == "fused" and isinstance(config.peft, PrefixTuning) and config.peft.prefix_projection,
            "train.update is fused, which sees one layer at a time, and peft.prefix_projection has an encoder that all "
            "layers share",
            "set update to ordinary, or prefix_projection to false",
        ),
        (
            train.param_dtype == "float16",
            "train.param_dtype is float16, in which small updates vanish and moments overflow",
            "set it to float32, and train.compute_dtype to float16",
        ),
        (
            train.compute_dtype == "float16" and train.param_dtype == "bfloat16",
            "train.compute_dtype is float16 and train.param_dtype is bfloat16, which keeps 3 bits less of a weight",
            "set param_dtype to float32, or compute_dtype to bfloat16",
        ),
        (
            train.update == "fused" and train.compute_dtype == "float16",
            "train.update is fused, whose first updates are made before all gradients are known to be finite, and "
            "train.compute_dtype is float16",
            "set compute_dtype to bfloat16, or update to ordinary",
        ),
        (
            train.shard_optimizer and (train.update == "fused" or config.peft.draws is not None),
            "train.shard_optimizer splits the state of all layers, and train.update fused or LISA takes one at a time",
            "set shard_optimizer to false; mesh.fsdp splits it too",
        ),
        (
            train.offload_optimizer and (train.update == "fused" or config.peft.draws is not None),
            "train.offload_optimizer brings the optimizer's state to the device after the backward pass, and "
            "train.update fused or LISA takes it within",
            "set offload_optimizer to false",
        ),
        (
            train.reduce_dtype is not None and (train.update == "fused" or config.peft.draws is not None),
            f"train.reduce_dtype is {train.reduce_dtype}, and train.update fused or LISA sums gradients as they come",
            "remove reduce_dtype",
        ),
        (
            train.reduce == "late" and (train.update == "fused" or config.peft.draws is not None),
            "train.reduce is late, which keeps the gradients of all layers to the end, and train.update fused or LISA "
            "takes one layer at a time",
            "set reduce to each",
        ),
        (
            train.stochastic_rounding and train.param_dtype != "bfloat16",
            f"train.stochastic_rounding rounds bfloat16 parameters, and train.param_dtype is {train.param_dtype}",
            "set param_dtype to bfloat16, or remove stochastic_rounding",
        ),
        (
            train.update == "fused" and (train.remat != "none" or train.unroll != "auto"),
            "train.update is fused, which computes each layer again in its own way, and train.remat or unroll is set",
            "remove them, or set update to ordinary",
        ),
        (
            train.update == "fused" and bool(config.optim.needs_whole_model),
            f"train.update is fused, which updates one layer at a time, and optim.type {config.optim.type} "
            f"{config.optim.needs_whole_model}",
            "set update to ordinary, or choose another optimizer, such as adamw",
        ),
        (
            config.quantization is not None and not isinstance(config.peft, AdapterConfig),
            f"model.quantize is {config.quantization}, whose matrices do not train, and peft.type is "
            f"{config.peft.type}, whose result is the whole model",
            "choose an adapter, such as peft: {type: lora}, or remove quantize",
        ),
        (
            config.quantization is not None
            and isinstance(config.peft, Lora)
            and config.peft.init_lora_weights == "pissa",
            "model.quantize stores the matrices, and peft.init_lora_weights is pissa, which takes a part of them away",
            "set init_lora_weights to true, or remove quantize",
        ),
        (
            isinstance(config.model, PretrainedModel) and bool(config.quantization) and len(config.model.adapters) > 1,
            f"model.quantize is {config.quantization}, into which no adapter is merged, and model.adapter has several",
            "merge them first (python -m jaxllm.convert merge), or remove quantize",
        ),
        *_adalora_conflicts(config),
        *_lisa_conflicts(config),
        *_pipeline_conflicts(config),
        (
            config.mesh.context != 1 and isinstance(config.peft, VirtualTokens),
            f"mesh.context is {config.mesh.context}, whose devices have equal parts of each row, and peft.type is "
            f"{config.peft.type}, which puts virtual tokens in front of it",
            "set context to 1, or choose another method, such as lora",
        ),
        (
            bool(share) and not config.data.eval_fraction,
            f"evals {share} have no path, and data.eval_fraction holds nothing out",
            "give them a path or set data.eval_fraction",
        ),
        (
            bool(config.data.eval_fraction) and not share,
            f"data.eval_fraction holds out {config.data.eval_fraction} of the data, and nothing evaluates it",
            "add {name: held_out, every: 100} to evals",
        ),
        (
            len(set(names)) < len(names),
            f"evals share a name: {names}",
            "give each its own",
        ),
        *_best_conflicts(config),
    ]
    return [(problem, remedy) for wrong, problem, remedy in table if wrong]


def _adalora_conflicts(config: Config) -> list[tuple[bool, str, str]]:
    """Of `peft: {type: adalora}`, which compares the triplets of all matrices after each update."""
    if not isinstance(config.peft, AdaLora):
        return []
    return [
        (
            config.train.update == "fused",
            "peft.type is adalora, which compares what it has in all layers, and train.update is fused, which updates "
            "one layer at a time",
            "set update to ordinary (the gradients of the triplets are small), or choose another method, such as lora",
        ),
        (
            bool(config.optim.averages),
            f"peft.type is adalora, which sets values to 0, and optim.type {config.optim.type} evaluates an average "
            "that would keep them",
            "choose another optimizer, such as adamw",
        ),
        (
            config.peft.lisa is not None,
            "peft.type is adalora, which compares what it has in all layers after each update, and peft.lisa trains a "
            "few at a time",
            "remove lisa, or choose another method, such as lora",
        ),
    ]


def _lisa_conflicts(config: Config) -> list[tuple[bool, str, str]]:
    """Of `peft: {type: lisa}` and `peft.lisa`, whose step is one of its own."""
    if config.peft.draws is None:
        return []
    train, optim = config.train, config.optim
    lisa = _names_lisa(config)
    alone = optim.needs_whole_model or (optim.averages and "evaluates an average of what it trains")
    return [
        (
            train.remat != "none" or train.unroll != "auto",
            f"{lisa}, which computes each layer again in its own way, and train.remat or unroll is set",
            "remove them",
        ),
        (
            train.compute_dtype == "float16",
            f"{lisa}, which does not scale the loss, and train.compute_dtype is float16",
            "set compute_dtype to bfloat16",
        ),
        (
            bool(alone),
            f"{lisa}, which gives each layer an optimizer of its own, and optim.type {optim.type} {alone}",
            "choose another optimizer, such as adamw",
        ),
    ]


def _names_lisa(config: Config) -> str:
    return "peft.type is lisa" if isinstance(config.peft, Lisa) else "peft.lisa is set"


def _pipeline_conflicts(config: Config) -> list[tuple[bool, str, str]]:
    """Of `mesh.pipeline`, whose stages compute in step, each on its own layers."""
    train, pipeline = config.train, f"mesh.pipeline is {config.mesh.pipeline}"
    virtual = f"train.virtual_stages is {train.virtual_stages}"
    if config.mesh.pipeline == 1:
        return [
            (
                train.virtual_stages > 1,
                f"{virtual}, which are chunks of the stages of a pipeline, and mesh.pipeline is 1",
                "set mesh.pipeline to the number of stages, or remove virtual_stages",
            )
        ]
    return [
        (
            train.virtual_stages > 1 and train.update == "fused",
            f"{virtual}, whose passes go on when those of the first layers end, and train.update is fused, which walks "
            "through a stage's layers once all passes are over",
            "set update to ordinary, or virtual_stages to 1",
        ),
        (
            train.virtual_stages > 1 and config.peft.draws is not None,
            f"{virtual}, and {_names_lisa(config)}, whose layers are drawn from stages that have theirs in one piece",
            "set virtual_stages to 1",
        ),
        (
            train.update == "fused" and config.peft.draws is not None,
            f"{pipeline}, {_names_lisa(config)}, and train.update is fused, which would keep the inputs of all layers "
            "for all micro-batches to save the gradients of a few layers",
            "set update to ordinary, or pipeline to 1",
        ),
        (
            isinstance(config.peft, PrefixTuning) and config.peft.prefix_projection,
            f"{pipeline}, whose stages see their own layers alone, and peft.prefix_projection has an encoder that all "
            "layers share",
            "set prefix_projection to false, or pipeline to 1",
        ),
        (
            train.reduce == "late",
            f"{pipeline}, whose stages add to their parts of the gradients at every tick, and train.reduce is late",
            "set reduce to each",
        ),
        (
            train.remat not in ("none", "full") or train.unroll != "auto",
            f"{pipeline}, which computes each layer again in its own way, and train.remat or unroll is set",
            "set remat to none or full, and remove unroll",
        ),
    ]


def _best_conflicts(config: Config) -> list[tuple[bool, str, str]]:
    """Of `checkpoint.best`: every checkpoint must have a value of the metric."""
    best, every = config.checkpoint.best, config.checkpoint.every
    if best is None or every is None:
        return []
    metrics = {
        f"eval/{held_out.name}/{value}": held_out for held_out in config.evals for value in ("loss", "perplexity")
    }
    if best not in metrics:
        known = f"choose one of {', '.join(metrics)}" if metrics else "add the set to evals"
        return [
            (True, f"checkpoint.best is {best}, which no set of evals gives", f"{known}.{did_you_mean(best, metrics)}")
        ]
    between = metrics[best].every
    below, above = every // between * between, -(-every // between) * between
    nearest = " or ".join(str(count) for count in (below, above) if count)
    return [
        (
            every % between != 0,
            f"checkpoint.best compares the checkpoints by {best}, which is evaluated every {between} steps, and "
            f"checkpoint.every is {every}: some would have no value",
            f"set checkpoint.every to {nearest}, or the set's every to a divisor of {every}",
        )
    ]
