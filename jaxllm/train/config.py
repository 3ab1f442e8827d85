"""The root of a run's config: it composes the sections that live beside the code they configure."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import optax
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, create_model, model_validator

from jaxllm.callbacks.base import CALLBACKS, CallbackConfig
from jaxllm.callbacks.tensorboard import TensorBoardConfig
from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.core.config import ByType, Section
from jaxllm.core.dtypes import DTypeName
from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.core.mesh import Layout, MeshConfig
from jaxllm.core.registry import Registry
from jaxllm.data.loader import DataConfig
from jaxllm.data.source import RecordsConfig, SourceConfig
from jaxllm.kernels.attention_choice import AskedAttention
from jaxllm.models import FAMILIES
from jaxllm.models.base import LM, FamilyConfig
from jaxllm.models.stack import RematConfig, scan
from jaxllm.nn.loss import Objective
from jaxllm.optim.build import OPTIMIZERS, SophiaG
from jaxllm.optim.config import OptimizerConfig
from jaxllm.peft import METHODS, Full, PeftConfig
from jaxllm.peft.files import AdapterConfig
from jaxllm.peft.lisa import Lisa
from jaxllm.peft.prefix import PrefixTuning
from jaxllm.train.curvature import Curvature
from jaxllm.train.fused import make_fused_step
from jaxllm.train.lisa import LisaOptimizer, make_lisa_step
from jaxllm.train.metrics import MetricsConfig
from jaxllm.train.pipeline import pipelined
from jaxllm.train.step import Step, accumulated, make_step


class PretrainedModel(Section):
    """A model to continue from."""

    path: str
    """a Hugging Face folder, a run's output folder, one of its checkpoints, or a model of the Hub:
    owner/name[@revision]"""
    tokenizer: str | None = None
    """a tokenizer folder, or a name of the Hub; default: the model's own"""
    adapter: str | None = None
    """an adapter of the model, in the files of HF peft, or a run that has trained one. With a peft section of the
    same adapter it trains on; else it is merged into the model first"""


class NewModel(Section):
    """A model to train from scratch: a family's config, and a tokenizer."""

    tokenizer: str
    """a tokenizer folder, as written by transformers, or a name of the Hub"""

    def family_config(self, vocab_size: Callable[[], int]) -> FamilyConfig:
        """The family's own config, with what `vocab_size` gives where the run's config does not set one."""
        fields = self.model_dump(exclude={"tokenizer"})
        if fields["vocab_size"] is None:
            fields["vocab_size"] = vocab_size()
        return FAMILIES[fields["type"]].config(**fields)


def _new_model(family: str) -> Any:
    """The section of a new model of `family`: the fields that follow from others may be left out."""

    def derived(otherwise: str) -> Any:
        return Annotated[PositiveInt | None, Field(None, description=f"default: {otherwise}")]

    return create_model(
        f"New{family.capitalize()}",
        __base__=(FAMILIES[family].config, NewModel),
        vocab_size=derived("the tokenizer's"),
        num_key_value_heads=derived("the attention heads"),
        head_dim=derived("hidden_size / attention heads"),
    )


NEW_MODELS = Registry[type[NewModel]]("model type")
for _family in FAMILIES:
    NEW_MODELS.add(_family, _new_model(_family))


class TrainConfig(Section):
    """How long and how to train. Give `steps` or `epochs`."""

    steps: PositiveInt | None = None
    """updates of the parameters"""
    epochs: PositiveInt | None = None
    """passes over the data"""
    batch_size: PositiveInt
    """sequences in an update, over all devices"""
    micro_batch_size: PositiveInt | None = None
    """sequences on one data-parallel device at a time; default: its whole share of the batch, or with a pipeline so
    few that there is a micro-batch for each stage. The rest of the batch is accumulated"""
    update: Literal["ordinary", "fused"] = "ordinary"
    """fused: each layer is updated inside the backward pass, so that the gradient of one layer exists at a time; it
    computes each layer again, and with max_grad_norm walks back twice"""
    remat: RematConfig = "none"
    """what the backward pass computes again to save memory: none, dots (all but matrix products), offload_dots (the
    same, and the products wait in the host's memory) or full; or all but {save: [...], offload: [...]}. With a pipeline
    none computes each layer again from its input, and full each stage from its own as well"""
    unroll: PositiveInt | Literal["auto", "all"] = "auto"
    """layers that the loop over them does at once: more may be faster, and compile longer; auto: all on a CPU, 1
    elsewhere"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """share of a target's probability that is spread over the whole vocabulary"""
    z_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """weight of the squared logarithm of the softmax's denominator in what is minimised, such as 1e-4; train/loss is
    the cross entropy without it"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """share that is dropped of the embedding and of what attention and feed-forward layers add, in training"""
    param_dtype: DTypeName = "float32"
    """what parameters are stored in"""
    compute_dtype: DTypeName | None = None
    """what activations and matrix products are in; default: bfloat16 on a GPU, float32 elsewhere. With float16 the
    loss is scaled, by as much as the gradients allow"""
    attention: AskedAttention = "auto"
    """how attention is computed: xla (plain JAX, holds all scores), cudnn (NVIDIA's kernel, for one document a row),
    flash (a GPU kernel that keeps packed documents apart), or auto, the fastest that works here. It is tested for
    leaks between documents before the run starts"""
    stochastic_rounding: bool = False
    """bfloat16 parameters are rounded up or down at random after an update, so that small ones count on average"""
    max_grad_norm: PositiveFloat | None = 1.0
    """gradients are scaled down to this global norm; null: never"""
    max_grad_value: PositiveFloat | None = None
    """every entry of a gradient is clamped to this magnitude, before the norm's scale; null: never"""
    deterministic: bool = False
    """whether the same run gives the same bits on a GPU, at some cost; on a CPU it always does"""
    max_bad_steps: PositiveInt = 3
    """the run stops after so many steps in a row whose loss or gradient is not finite; none of them is applied"""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs; got steps {self.steps} and epochs {self.epochs}")
        return self

    def accumulation(self, layout: Layout) -> tuple[int, int]:
        """`(micro-batches, sequences in each)` of a batch, over all devices.

        Raises UserError with the nearest batch sizes that work, or if a pipeline has fewer micro-batches than stages.
        """
        ways, stages = layout.size("batch"), layout.stages
        most = max(1, self.batch_size // (ways * stages))
        fitting = next(n for n in range(most, 0, -1) if self.batch_size // ways % n == 0)
        micro = self.micro_batch_size or fitting
        together = micro * ways
        if self.batch_size % together:
            below, above = self.batch_size // together * together, -(-self.batch_size // together) * together
            nearest = " or ".join(str(size) for size in (below, above) if size)
            raise UserError(
                f"train.batch_size {self.batch_size} is not a multiple of {together} = train.micro_batch_size "
                f"{micro} × {ways} data-parallel devices (mesh data × fsdp); set train.batch_size to {nearest}, "
                "or change train.micro_batch_size or the mesh"
            )
        if (count := self.batch_size // together) < stages:
            smaller = f"train.micro_batch_size to {fitting} or " if fitting * ways * stages <= self.batch_size else ""
            raise UserError(
                f"train.batch_size {self.batch_size} is {count} micro-batch{'es' if count > 1 else ''} of {together} "
                f"sequences, fewer than the {stages} stages of mesh.pipeline, some of which would always wait; set "
                f"{smaller}train.batch_size to {together * stages} or more"
            )
        return self.batch_size // together, together

    def last_step(self, rows: int, step: int, epoch: int, position: int) -> int:
        """The number of the last step: `steps`, or the step after which all `epochs` of `rows` rows were seen.

        After `step` steps `position` rows of `epoch` are behind; these may have been of another batch size.
        """
        if self.epochs is None:
            assert self.steps is not None  # one of the two is given
            return self.steps
        left = self.epochs * rows - (epoch * rows + position)
        return step + -(-left // self.batch_size)

    def computes_in(self, layout: Layout) -> str:
        """The compute dtype on the devices of `layout`."""
        return self.compute_dtype or ("bfloat16" if layout.platform == "gpu" else "float32")

    def scales_loss(self) -> bool:
        """Whether gradients are of a dtype that cannot hold small ones."""
        return self.compute_dtype == "float16"

    def step(
        self,
        lm: LM,
        tx: optax.GradientTransformationExtraArgs | LisaOptimizer,
        schedule: optax.Schedule,
        seed: int,
        curvature: Curvature | None = None,
    ) -> Step:
        """The training step. seed: of what it draws."""
        options = {
            "objective": Objective(self.label_smoothing, self.z_loss),
            "max_grad_norm": self.max_grad_norm,
            "max_grad_value": self.max_grad_value,
            "stochastic_rounding": self.stochastic_rounding,
            "seed": seed,
        }
        if isinstance(tx, LisaOptimizer):
            return make_lisa_step(tx, schedule, **options)
        if self.update == "fused":
            return make_fused_step(lm, tx, schedule, **options)
        if lm.layout.stages > 1:
            kept = "stages" if self.remat == "full" else "layers"
            return make_step(lm, tx, schedule, gradient=pipelined(kept), curvature=curvature, **options)
        unroll = self.unroll
        if unroll == "auto":
            unroll = "all" if lm.layout.platform == "cpu" else 1
        gradient = accumulated(scan(self.remat, unroll))
        return make_step(lm, tx, schedule, gradient=gradient, curvature=curvature, **options)


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
    seed: NonNegativeInt = 0
    """of new weights, of the order of the data and of what is held out"""
    model: Annotated[PretrainedModel | NewModel, ByType(NEW_MODELS, otherwise=PretrainedModel)]
    data: DataConfig
    mesh: MeshConfig = MeshConfig()
    optim: Annotated[OptimizerConfig, ByType(OPTIMIZERS)]
    peft: Annotated[PeftConfig, ByType(METHODS)] = Full(type="full")
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evals: list[EvalConfig] = Field(default_factory=list)
    metrics: MetricsConfig = MetricsConfig()
    callbacks: list[Annotated[CallbackConfig, ByType(CALLBACKS)]] = Field(default_factory=lambda: [TensorBoardConfig()])
    """what else sees the run; [] for nothing"""

    def curvature(self) -> Curvature | None:
        """What the optimizer is told of the curvature."""
        sophia = self.optim
        return Curvature(sophia.hessian_every, sophia.rho) if isinstance(sophia, SophiaG) else None

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
        *_lisa_conflicts(config),
        *_pipeline_conflicts(config),
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


def _lisa_conflicts(config: Config) -> list[tuple[bool, str, str]]:
    """Of `peft: {type: lisa}`, whose step is one of its own."""
    if not isinstance(config.peft, Lisa):
        return []
    train, optim = config.train, config.optim
    alone = optim.needs_whole_model or (optim.averages and "evaluates an average of what it trains")
    return [
        (
            train.update == "fused",
            "peft.type is lisa, which holds the gradients of a few layers alone, and train.update is fused",
            "set update to ordinary",
        ),
        (
            train.remat != "none" or train.unroll != "auto",
            "peft.type is lisa, which computes each layer again in its own way, and train.remat or unroll is set",
            "remove them",
        ),
        (
            train.compute_dtype == "float16",
            "peft.type is lisa, which does not scale the loss, and train.compute_dtype is float16",
            "set compute_dtype to bfloat16",
        ),
        (
            bool(alone),
            f"peft.type is lisa, which gives each layer an optimizer of its own, and optim.type {optim.type} {alone}",
            "choose another optimizer, such as adamw",
        ),
    ]


def _pipeline_conflicts(config: Config) -> list[tuple[bool, str, str]]:
    """Of `mesh.pipeline`, whose stages compute in step, each on its own layers."""
    if config.mesh.pipeline == 1:
        return []
    train, pipeline = config.train, f"mesh.pipeline is {config.mesh.pipeline}"
    return [
        (
            train.update == "fused",
            f"{pipeline}, whose micro-batches pass each layer at different times, and train.update is fused, which "
            "updates a layer after the last of them, with the others waiting",
            "set update to ordinary (a device has the gradients of its own stage alone), or pipeline to 1",
        ),
        (
            isinstance(config.peft, Lisa),
            f"{pipeline}, and peft.type is lisa, which draws the layers that train from all stages: each would hold "
            "gradients for as many as could fall to it, and the others would wait for the one with most",
            "set pipeline to 1 and use mesh.fsdp, or choose another method, such as lora",
        ),
        (
            isinstance(config.peft, PrefixTuning) and config.peft.prefix_projection,
            f"{pipeline}, whose stages see their own layers alone, and peft.prefix_projection has an encoder that all "
            "layers share",
            "set prefix_projection to false, or pipeline to 1",
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
