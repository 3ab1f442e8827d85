"""Training is compiled here and nowhere else."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxllm.core.mesh import Layout
from jaxllm.step.batch import Batch
from jaxllm.step.state import Metrics, Step, TrainState


@dataclass(frozen=True)
class CompiledStep:
    """A compiled step, what compiling took in seconds, and the bytes that a device holds for it.

    argument_bytes: state and batch. temp_bytes: what lives within the step. peak_bytes: the most at a time.
    in_place_bytes: of the state, what the new one is written over. host_bytes: what is in the host's memory, between
    steps or within one; on a CPU that is the device's.
    """

    run: Step
    compile_s: float
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    in_place_bytes: int
    host_bytes: int


def compile_step(
    step: Step, state: Any, batch: Any, layout: Layout, options: Mapping[str, Any] | None = None
) -> CompiledStep:
    """Compiles `step` for abstract arguments with shardings. The state's buffers are reused for the new state.

    options: the compiler's, for this program alone.
    """
    start = time.monotonic()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, layout.replicated))
    compiled = jitted.lower(state, batch).compile(compiler_options=dict(options or {}))
    memory: Any = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return CompiledStep(
        compiled,
        time.monotonic() - start,
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        peak,
        memory.alias_size_in_bytes + memory.host_alias_size_in_bytes,
        memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
    )


def compile_steps(
    step: Step, state: Any, batches: Sequence[Any], layout: Layout, options: Mapping[str, Any] | None = None
) -> CompiledStep:
    """Compiles `step` for each of several shapes of a batch; `run` takes the program of its batch's shape.

    The bytes are those of the largest program, and the seconds those of all.
    """
    compiled = {batch["tokens"].shape: compile_step(step, state, batch, layout, options) for batch in batches}
    largest = max(compiled.values(), key=lambda one: one.peak_bytes)
    if len(compiled) == 1:
        return largest

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return compiled[batch["tokens"].shape].run(state, batch)

    return replace(largest, run=run, compile_s=sum(one.compile_s for one in compiled.values()))
