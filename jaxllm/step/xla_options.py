"""XLA's options for the training step: what suits the devices and the mesh, and what the config says."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.errors import UserError
from jaxllm.models.lm import LM

Options = dict[str, Any]
"""By the names of the flags without dashes."""


def compiler_options(
    lm: LM,
    *,
    update: str,
    xla: Mapping[str, Any],
    deterministic: bool = False,
    autotuned: Path | None = None,
) -> Options:
    """The options for the step of `lm`: those that suit its mesh, but for what the environment's XLA_FLAGS sets, then
    those of `train.deterministic` and of `train.xla`.

    update, xla, deterministic: as in the section `train`. autotuned: the folder that keeps the kernels of a
    deterministic run, if there is a run. Raises UserError for an option of `xla` that XLA does not take.
    """
    platform = lm.layout.platform
    asked_outside = re.findall(r"--(xla_\w+)", os.environ.get("XLA_FLAGS", ""))
    suiting = {name: value for name, value in suiting_options(lm, update).items() if name not in asked_outside}
    if suiting and _refusal(suiting):
        suiting = {name: value for name, value in suiting.items() if not _refusal({name: value})}
    for name, value in xla.items():
        if refusal := _refusal({name: value}):
            raise UserError(
                f"train.xla.{name}: {value!r} is not taken by the compiler of jax {jax.__version__} "
                f"({refusal}); see https://openxla.org/xla/flags_guidance, or remove it"
            )
    return suiting | (deterministic_options(autotuned, platform) if deterministic else {}) | dict(xla)


def suiting_options(lm: LM, update: str) -> Options:
    """What suits the mesh of `lm` and `train.update`; nothing but on GPUs.

    XLA's own rematerialisation is off: what is computed again is `train.remat`'s to say, and a step that does not fit
    is refused. On several devices transfers run beside the computation: they are scheduled early, and those of one
    layer combined into one. Those of the next layer begin while one computes, which takes the memory of a layer more;
    so not where the update is fused, to save memory. What the stages of a pipeline pass on is left as it is: XLA's pass
    for that, xla_gpu_enable_pipelined_p2p, breaks off on such a program in jax 0.10. The rest is as XLA has it, command
    buffers (CUDA graphs) among it, which it makes of what it can. These are the choices of MaxText's and JAX-Toolbox's
    recipes for GPUs.
    """
    layout = lm.layout
    if layout.platform != "gpu":
        return {}
    options: Options = {"xla_disable_hlo_passes": "rematerialization"}
    if layout.mesh.size == 1:
        return options
    layer = layer_bytes(lm)
    options["xla_gpu_enable_latency_hiding_scheduler"] = True
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        options[f"xla_gpu_{kind}_combine_threshold_bytes"] = layer
        if update == "ordinary":
            options[f"xla_gpu_enable_pipelined_{kind}"] = True
    return options


def layer_bytes(lm: LM) -> int:
    """The bytes of the parameters of one layer in the compute dtype, those that a device multiplies with."""
    leaves = jax.tree.leaves(lm.abstract()["layers"])
    entries = sum(leaf.size for leaf in leaves) // lm.config.num_hidden_layers
    return entries * jnp.dtype(lm.compute_dtype).itemsize // lm.layout.mesh.shape["tensor"]


def deterministic_options(autotuned: Path | None, platform: str) -> Options:
    """Those for a program that gives the same bits each time; none on a platform that always does.

    On a GPU, operations that add in whatever order their threads finish are left out, and what the autotuner finds
    is kept in the folder `autotuned`, if one is given. Only the first process writes there.
    """
    if platform != "gpu":
        return {}
    options = {"xla_gpu_exclude_nondeterministic_ops": True}
    if autotuned is None:
        return options
    mode = "UPDATE" if jax.process_index() == 0 else "READ"
    return options | {
        "xla_gpu_per_fusion_autotune_cache_dir": str(autotuned.absolute()),
        "xla_gpu_experimental_autotune_cache_mode": f"AUTOTUNE_CACHE_MODE_{mode}",
    }


def describe_options(options: Mapping[str, Any]) -> str:
    """The options as they would stand in XLA_FLAGS, without dashes."""
    return " ".join(
        f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in options.items()
    )


def describe_determinism(autotuned: Path, platform: str) -> str:
    """What `train.deterministic` changes, and what that costs."""
    if platform != "gpu":
        return "a CPU gives the same bits each time anyway; train.deterministic changes nothing here"
    return (
        "sums in a fixed order (the embedding's gradient above all), which takes longer: compare perf/step_time_s with "
        f"a run without. The kernels chosen are kept in {autotuned.absolute()}"
    )


def _refusal(options: Options) -> str:
    """What XLA says against options; nothing if it takes them. It knows all names on every platform."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return ""
