"""How long and how to train: the section `train` of a run's config."""

from typing import Annotated, Any, Literal, NamedTuple

import jax.numpy as jnp
from pydantic import Field, PositiveInt, field_validator, model_validator

from jaxllm.core.config import OnResume, Section
from jaxllm.core.config.bounds import Integer, PositiveOrInfinite
from jaxllm.core.dtypes import DTypeName
from jaxllm.core.errors import UserError
from jaxllm.core.host_memory import check_host_memory
from jaxllm.core.mesh import Layout
from jaxllm.kernels.attention_choice import AskedAttention
from jaxllm.models.pipeline_schedule import Schedule
from jaxllm.models.stack import RematConfig, check_offload


class Accumulation(NamedTuple):
    """How a batch is cut: into `micro_batches` of `rows` rows each, over all devices."""

    micro_batches: int
    rows: int


class TrainConfig(Section):
    """How long and how to train. Give `steps` or `epochs`."""

    steps: Annotated[PositiveInt | None, OnResume.NOTED] = None
    """updates of the parameters"""
    epochs: Annotated[PositiveInt | None, OnResume.NOTED] = None
    """passes over the data"""
    batch_size: Annotated[PositiveInt, OnResume.NEW_FOLDER]
    """sequences in an update, over all devices"""
    micro_batch_size: Annotated[PositiveInt | None, OnResume.NOTED] = None
    """sequences on one data-parallel device at a time. Default: the device's whole share of the batch; with a pipeline,
    a number small enough to give each stage a micro-batch. The rest of the batch is accumulated"""
    update: Annotated[Literal["ordinary", "fused"], OnResume.NOTED] = "ordinary"
    """fused: each layer is updated inside the backward pass, so that the gradient of one layer exists at a time; it
    computes each layer again, and with max_grad_norm walks back twice. With a pipeline each stage does so with its own
    layers, after the micro-batches have passed forward and backward"""
    shard_optimizer: Annotated[bool, OnResume.NOTED] = False
    """the devices along mesh.data split the optimizer's state, which each has whole otherwise (ZeRO-1)"""
    offload_optimizer: Annotated[bool, OnResume.NOTED] = False
    """the optimizer's state is kept in the host's pinned memory. The device holds it only during the update, for one
    parameter at a time (with update fused, one layer), so it takes no memory beside the activations. Each step moves
    the state to the device and back"""
    reduce_dtype: Annotated[Literal["bfloat16"] | None, OnResume.NOTED] = None
    """dtype in which gradients are summed over mesh.data. bfloat16 sends half as much as float32. Default: float32 with
    several micro-batches, compute_dtype with a single one"""
    remat: Annotated[RematConfig, OnResume.NOTED] = "none"
    """what the backward pass recomputes to save memory. none: nothing. dots: everything except matrix products, which
    are stored. offload_dots: as dots, but the products are stored in the host's memory. full: everything. {save:
    [...], offload: [...]}: everything except the named values. With update fused, LISA or a pipeline, none recomputes
    each layer from the layer's input, as full does; in a pipeline full also recomputes each stage from the stage's
    input, unless update is fused"""
    virtual_stages: Annotated[PositiveInt, OnResume.NOTED] = 1
    """number of chunks of layers on each stage of mesh.pipeline. v chunks cut the bubble about v-fold, for v times the
    transfers and more stored activations"""
    unroll: Annotated[PositiveInt | Literal["auto", "all"], OnResume.NOTED] = "auto"
    """layers that the loop over them does at once: more may be faster, and compile longer; auto: all of up to 64 layers
    on a CPU, otherwise 1. With update fused or LISA, in the forward pass alone, and auto is 1"""
    label_smoothing: Annotated[float, OnResume.NEW_FOLDER] = Field(default=0.0, ge=0, lt=1)
    """share of a target's probability that is spread over the whole vocabulary"""
    z_loss: Annotated[float, OnResume.NEW_FOLDER] = Field(default=0.0, ge=0, allow_inf_nan=False)
    """weight of the squared logarithm of the softmax's denominator in what is minimised, such as 1e-4; train/loss is
    the cross entropy without it"""
    dropout: Annotated[float, OnResume.NEW_FOLDER] = Field(default=0.0, ge=0, lt=1)
    """share that is dropped of the embedding and of what attention and feed-forward layers add, in training"""
    param_dtype: DTypeName = "float32"
    """what parameters are stored in"""
    compute_dtype: Annotated[DTypeName | None, OnResume.NOTED] = None
    """what activations and matrix products are in; default: bfloat16 on a GPU, float32 elsewhere. With float16 the
    loss is scaled, by as much as the gradients allow"""
    attention: Annotated[AskedAttention, OnResume.NOTED] = "auto"
    """how attention is computed: xla (plain JAX, holds all scores), cudnn (NVIDIA's kernel, for one document a row),
    flash (a GPU kernel that keeps packed documents apart), or auto, the fastest that works here. It is tested for
    leaks between documents before the run starts"""
    stochastic_rounding: Annotated[bool, OnResume.NEW_FOLDER] = False
    """bfloat16 parameters are rounded up or down at random after an update, so that small ones count on average"""
    max_grad_norm: Annotated[PositiveOrInfinite | None, OnResume.NEW_FOLDER] = 1.0
    """gradients are scaled down to this global norm; null: never"""
    max_grad_value: Annotated[PositiveOrInfinite | None, OnResume.NEW_FOLDER] = None
    """every entry of a gradient is clamped to this magnitude, before the norm's scale; null: never"""
    deterministic: Annotated[bool, OnResume.NOTED] = False
    """whether the same run gives the same bits on a GPU, at some cost; on a CPU it always does"""
    xla: Annotated[dict[str, bool | Integer | float | str], OnResume.NOTED] = Field(default_factory=dict)
    """options of XLA for the training step, in place of those chosen for the mesh, which the log lists, such as
    {xla_gpu_enable_latency_hiding_scheduler: false}"""
    max_bad_steps: Annotated[PositiveInt, OnResume.NOTED] = 3
    """the run stops after this number of steps in a row whose loss, gradient or parameter norm is not finite; they
    change no parameter"""

    @model_validator(mode="before")
    @classmethod
    def _without_reduce(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "reduce" not in values:
            return values
        if values["reduce"] != "each":
            raise ValueError(
                f"train.reduce is {values['reduce']}, which this version does not have: it held 7 to 11 bytes more per "
                "layer parameter than reduce: each, and mesh.data across nodes saves more; remove reduce, and set "
                "mesh: {data: the number of nodes, fsdp: -1}, or a larger train.micro_batch_size"
            )
        return {name: value for name, value in values.items() if name != "reduce"}

    @field_validator("xla")
    @classmethod
    def _has_flags(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name.startswith("xla_"):
                raise ValueError(f"{name!r} is no flag of XLA; write one as in XLA_FLAGS, without dashes: xla_…")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> "TrainConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give either steps or epochs; got steps {self.steps} and epochs {self.epochs}")
        return self

    def accumulation(self, layout: Layout) -> Accumulation:
        """How the devices of `layout` take a batch.

        Raises UserError with the nearest batch sizes that work, or if a pipeline has fewer micro-batches than stages,
        or with virtual ones no multiple of them.
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
        if (count := self.batch_size // together) >= stages and self.virtual_stages > 1 and count % stages:
            round_ = together * stages
            below, above = self.batch_size // round_ * round_, -(-self.batch_size // round_) * round_
            raise UserError(
                f"train.batch_size {self.batch_size} is {count} micro-batches of {together} sequences, and with "
                f"train.virtual_stages as many as mesh.pipeline = {stages} go round together; set train.batch_size to "
                f"{below} or {above}, or train.virtual_stages to 1"
            )
        if count < stages:
            smaller = f"train.micro_batch_size to {fitting} or " if fitting * ways * stages <= self.batch_size else ""
            raise UserError(
                f"train.batch_size {self.batch_size} is {count} micro-batch{'es' if count > 1 else ''} of {together} "
                f"sequences, fewer than the {stages} stages of mesh.pipeline, some of which would always wait; set "
                f"{smaller}train.batch_size to {together * stages} or more"
            )
        return Accumulation(count, together)

    def last_step(self, rows: int, step: int, epoch: int, position: int) -> int:
        """The number of the last step: `steps`, or the step after which all `epochs` of `rows` rows were seen.

        After `step` steps `position` rows of `epoch` are behind; these may have been of another batch size.
        """
        if self.epochs is None:
            assert self.steps is not None  # one of the two is given
            return self.steps
        left = self.epochs * rows - (epoch * rows + position)
        return step + -(-left // self.batch_size)

    def check_memories(self, device: Any) -> None:
        """Raises UserError if something is to wait in the host's memory and `device` cannot reach any."""
        check_offload(self.remat, device)
        if self.offload_optimizer:
            remedy = "set it to false; mesh.fsdp and train.shard_optimizer split the state over devices"
            check_host_memory(device, "train.offload_optimizer keeps the optimizer's state", remedy)

    def check_dtypes(self) -> None:
        """Raises UserError for float64 where JAX would take float32 in its place."""
        for key in ("param_dtype", "compute_dtype"):
            if getattr(self, key) == "float64" and jnp.result_type(float) != jnp.float64:
                raise UserError(
                    f"train.{key} is float64, which JAX has only where it is asked for; set the environment variable "
                    f"JAX_ENABLE_X64=1, or train.{key} to float32"
                )

    def ticks(self, stages: int, micro_batches: int) -> Schedule:
        """When the stages of a pipeline work on the micro-batches of a batch."""
        walks = 0 if self.update == "ordinary" else 1 if self.max_grad_norm is None else 2
        return Schedule(stages, micro_batches, walks, self.virtual_stages)

    def scales_loss(self) -> bool:
        """Whether gradients are of a dtype that cannot hold small ones."""
        return self.compute_dtype == "float16"
