"""The same bits from the same step: what `train.deterministic` asks of the compiler."""

from pathlib import Path
from typing import Any

import jax

# In output_dir: which kernels were timed to be the fastest, so that a run that goes on takes the same ones.
AUTOTUNED = "autotune"


def deterministic_options(output_dir: Path | None, platform: str) -> dict[str, Any]:
    """XLA's options for a program that gives the same bits each time; none on a platform that always does.

    On a GPU, operations that add in whatever order their threads finish are left out, and what the autotuner finds
    is kept in `output_dir`, if one is given. Only the first process writes there.
    """
    if platform != "gpu":
        return {}
    options = {"xla_gpu_exclude_nondeterministic_ops": True}
    if output_dir is None:
        return options
    mode = "UPDATE" if jax.process_index() == 0 else "READ"
    return options | {
        "xla_gpu_per_fusion_autotune_cache_dir": str(output_dir.absolute() / AUTOTUNED),
        "xla_gpu_experimental_autotune_cache_mode": f"AUTOTUNE_CACHE_MODE_{mode}",
    }


def describe_options(options: dict[str, Any]) -> str:
    """What they change, and what that costs."""
    if not options:
        return "a CPU gives the same bits each time anyway; train.deterministic changes nothing here"
    return (
        "sums in a fixed order (the embedding's gradient above all), which takes longer: compare perf/step_time_s with "
        f"a run without. The kernels chosen are kept in {options['xla_gpu_per_fusion_autotune_cache_dir']}"
    )
