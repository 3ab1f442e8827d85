"""The memory that a run would take, from its compiled step: nothing is loaded, run or written."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.hardware import Target
from jaxllm.core.mesh import Layout, MeshConfig
from jaxllm.kernels.attention_choice import AttentionChoice, plan_attention
from jaxllm.models import LM
from jaxllm.nn.quantized import STORED
from jaxllm.plan.targets import compile_only_devices
from jaxllm.runs.config import Config
from jaxllm.runs.train_config import Accumulation
from jaxllm.step.batch import check_length
from jaxllm.step.compile import CompiledStep
from jaxllm.train.model import model_without_weights
from jaxllm.train.program import Program

# Memory does not depend on how long a run is; one of epochs alone is taken to be so long, since only data can tell.
ASSUMED_STEPS = 10**6

# What XLA says where it has no tiling for a product of matrices of odd lengths, such as those with virtual tokens. With
# a card it would try several, cuBLAS among them; without one it takes what it believes in, and breaks off.
NO_TILING = "find output tile sizes"


@dataclass(frozen=True)
class Plan:
    """A compiled training step.

    parts: bytes on each device by what they hold, which add up to the peak. by_cublas: all products of matrices were
    left to cuBLAS, since XLA had no tiling for one.
    """

    program: Program
    accumulation: Accumulation
    attention: AttentionChoice
    compiled: CompiledStep
    parts: Mapping[str, int]
    by_cublas: bool

    @property
    def lm(self) -> LM:
        """The model that would train."""
        return self.program.lm


def devices_for(mesh: MeshConfig, target: Target | None, count: int | None) -> Sequence[Any]:
    """Devices to compile for: `target`s, or simulated CPU devices where it is None.

    count: how many; by default as many as `mesh` names. Raises UserError if there are not so many.
    """
    count = count or math.prod(size for size in mesh.sizes.values() if size != -1)
    if target is not None:
        return compile_only_devices(target, count)
    with suppress(RuntimeError):  # they are there already, and stay as many
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--devices {count}: this process has {len(devices)} simulated CPU devices")
    return devices[:count]


def plan(config: Config, devices: Sequence[Any]) -> Plan:
    """Compiles the training step of `config` for `devices`, which need not be there.

    Raises UserError for what a run would refuse too: a mesh that does not fit the devices, a batch that does not
    divide, a model without a shape.
    """
    config.train.check_dtypes()
    layout = Layout.of(config.mesh, devices)
    accumulation = config.train.accumulation(layout)
    check_length(config.data.seq_len, layout)
    if layout.platform == "cpu":
        config.train.check_memories(devices[0])
    lm = model_without_weights(config, layout)
    attention = plan_attention(config.train.attention, lm.attention_needs(config.data.packed))
    lm = replace(lm, attention=attention.form)
    steps = config.train.steps or config.optim.schedule.steps or ASSUMED_STEPS
    program = Program.of(config, lm, steps)
    widths, options, by_cublas = [config.data.seq_len], program.compiler_options(), False
    try:
        compiled = program.compile(accumulation, widths, options)
    except jax.errors.JaxRuntimeError as error:
        if NO_TILING not in str(error):
            raise
        by_cublas = True
        compiled = program.compile(accumulation, widths, {**options, "xla_gpu_enable_triton_gemm": False})
    return Plan(program, accumulation, attention, compiled, _parts(program, compiled), by_cublas)


def _parts(program: Program, compiled: CompiledStep) -> dict[str, int]:
    state = program.state
    parameters, moments = bytes_on_a_device((state.params, state.frozen)), bytes_on_a_device(state.opt_state)
    quantized = [leaf for path, leaf in tree.flatten(state.frozen).items() if path.rpartition("/")[2] in STORED]
    in_few_bits = bytes_on_a_device(quantized)
    return {
        **({f"matrices in {program.lm.quantization}": in_few_bits} if quantized else {}),
        "other parameters" if quantized else "parameters": parameters - in_few_bits,
        "optimizer state": moments,
        "batch and counters": compiled.argument_bytes - parameters - moments,
        "activations, gradients and other temporaries": compiled.temp_bytes,
        "results that are not written in place": compiled.peak_bytes - compiled.argument_bytes - compiled.temp_bytes,
    }


def bytes_on_a_device(arrays: Any) -> int:
    """The bytes that each device holds of a tree of abstract arrays with shardings."""
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
