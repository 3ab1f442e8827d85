"""What contradicts the section `train` of a config: within it, and with the optimizer, the method and the pipeline."""

from collections.abc import Iterator

from jaxllm.core.config import Conflict
from jaxllm.core.mesh import MeshConfig
from jaxllm.optim.config import OptimizerConfig
from jaxllm.peft import PeftConfig
from jaxllm.runs.train_config import TrainConfig


def step_conflicts(train: TrainConfig, optim: OptimizerConfig, peft: PeftConfig) -> Iterator[Conflict]:
    """What contradicts a setting of the step."""
    fused = train.update == "fused"
    if fused and (shared := peft.shared_part):
        yield Conflict(
            f"train.update is fused, which sees one layer at a time, and {shared.description}",
            f"set update to ordinary, or {shared.without}",
        )
    yield from _dtype_conflicts(train)
    if train.stochastic_rounding and train.param_dtype != "bfloat16":
        yield Conflict(
            f"train.stochastic_rounding rounds bfloat16 parameters, and train.param_dtype is {train.param_dtype}",
            "set param_dtype to bfloat16, or remove stochastic_rounding",
        )
    if fused and optim.needs_whole_model:
        yield Conflict(
            f"train.update is fused, which updates one layer at a time, and optim.type {optim.type} "
            f"{optim.needs_whole_model}",
            "set update to ordinary, or choose another optimizer, such as adamw",
        )


def _dtype_conflicts(train: TrainConfig) -> Iterator[Conflict]:
    if train.param_dtype == "float16":
        yield Conflict(
            "train.param_dtype is float16, in which small updates vanish and moments overflow",
            "set it to float32, and train.compute_dtype to float16",
        )
    if train.compute_dtype == "float16" and train.param_dtype == "bfloat16":
        yield Conflict(
            "train.compute_dtype is float16 and train.param_dtype is bfloat16, which keeps 3 bits less of a weight",
            "set param_dtype to float32, or compute_dtype to bfloat16",
        )
    if train.update == "fused" and train.compute_dtype == "float16":
        yield Conflict(
            "train.update is fused, whose first updates are made before all gradients are known to be finite, and "
            "train.compute_dtype is float16",
            "set compute_dtype to bfloat16, or update to ordinary",
        )


def pipeline_conflicts(train: TrainConfig, mesh: MeshConfig, peft: PeftConfig) -> Iterator[Conflict]:
    """What contradicts `mesh.pipeline`, whose stages compute in step, each on its own layers."""
    pipeline = f"mesh.pipeline is {mesh.pipeline}"
    if mesh.pipeline == 1:
        if train.virtual_stages > 1:
            yield Conflict(
                f"train.virtual_stages is {train.virtual_stages}, which are chunks of the stages of a pipeline, and "
                "mesh.pipeline is 1",
                "set mesh.pipeline to the number of stages, or remove virtual_stages",
            )
        return
    if shared := peft.shared_part:
        yield Conflict(
            f"{pipeline}, whose stages see their own layers alone, and {shared.description}",
            f"set {shared.without}, or pipeline to 1",
        )
    if train.remat not in ("none", "full") or train.unroll != "auto":
        yield Conflict(
            f"{pipeline}, which computes each layer again in its own way, and train.remat or unroll is set",
            "set remat to none or full, and remove unroll",
        )
