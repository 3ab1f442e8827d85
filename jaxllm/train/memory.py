"""Whether a compiled step fits into its devices, said before anything is allocated."""

from typing import Any

import jax
import psutil

from jaxllm.core.errors import UserError
from jaxllm.train.config import Config
from jaxllm.train.step import CompiledStep

GIB = 2**30


def device_bytes(device: Any) -> int:
    """The bytes that a program may use on `device`; simulated CPU devices share what the machine has free."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return psutil.virtual_memory().available // len(jax.local_devices())


def check_fits(compiled: CompiledStep, config: Config, micro_batch_size: int, limit: int) -> None:
    """Raises UserError if a device needs more than `limit` bytes for the compiled step."""
    if compiled.peak_bytes > limit:
        raise UserError(out_of_memory(compiled, config, micro_batch_size, limit))


def out_of_memory(compiled: CompiledStep, config: Config, micro_batch_size: int, limit: int) -> str:
    """What was asked of each device, what there is, and the settings that would help most, three at the most."""
    return (
        f"out of memory: a training step needs {compiled.peak_bytes / GIB:.2f} GiB on each device "
        f"({compiled.argument_bytes / GIB:.2f} parameters, optimizer state and batch, "
        f"{compiled.temp_bytes / GIB:.2f} activations and gradients), and {limit / GIB:.2f} GiB are there. "
        f"What would help most: {remedies(compiled, config, micro_batch_size)}"
    )


def remedies(compiled: CompiledStep, config: Config, micro_batch_size: int) -> str:
    """The settings that would lower the peak most, three at the most. micro_batch_size: of a device."""
    train = config.train
    activations, state = [], []
    if train.remat != "full" and train.update == "ordinary":
        activations.append("train.remat: full")
    if micro_batch_size > 1:
        activations.append(f"train.micro_batch_size: {micro_batch_size // 2} (now {micro_batch_size})")
    activations.append(f"data.seq_len: {config.data.seq_len // 2} (now {config.data.seq_len})")
    fits_fused = train.compute_dtype != "float16" and (config.mesh.pipeline == 1 or config.peft.draws is None)
    if train.update == "ordinary" and fits_fused:
        activations.append("train.update: fused (the gradient of one layer at a time)")
    state.append("more devices on mesh.fsdp or mesh.tensor, which divide parameters and optimizer state")
    if config.optim.type == "adamw":
        state.append("optim.type: lion (half of AdamW's state) or adalomo (almost none)")
    if train.param_dtype != "bfloat16":
        state.append("train.param_dtype: bfloat16")
    larger_first = compiled.temp_bytes > compiled.argument_bytes
    first, second = (activations, state) if larger_first else (state, activations)
    return "; ".join([*first[:2], *second[:2], *first[2:], *second[2:]][:3])
