"""What `jaxllm.plan` prints."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from jaxllm.core.console import saying
from jaxllm.core.hardware import GIB, Target
from jaxllm.peft.base import describe
from jaxllm.plan.plan import Plan
from jaxllm.processes.environment import GPU_MEMORY_SHARE, quiet_libraries
from jaxllm.train.memory import Compile, remedies, tried
from jaxllm.train.model import kind_and_size

# The seconds after which no other remedy is compiled.
TRY_SECONDS = 120


def report_devices(console: Console, target: Target, missing: Sequence[str]) -> None:
    """Says what is compiled for, before it takes its time. missing: the wheels that a GPU would need."""
    say = saying(console)
    if missing:
        say("note", f"planned for simulated CPU devices, not for {target.name}: {', '.join(missing)} not installed")
        say("", "pip install 'jaxllm[plan]' brings CUDA's compiler, which needs no GPU")
    else:
        say("card", f"{target.name}, {_gib(target.memory_bytes)}, by its description; none is used here")


def report(console: Console, planned: Plan, target: Target) -> None:
    """What was compiled, what each device holds of it, and whether that fits `target`."""
    say, lm, config = saying(console), planned.lm, planned.program.config
    train = config.train
    micro_batches, rows = planned.accumulation
    say("devices", lm.layout)
    say("model", f"{kind_and_size(lm)} in {train.param_dtype}, computing in {lm.compute_dtype}")
    if config.peft.type != "full":
        say("peft", describe(config.peft, lm))
    cut = f"{micro_batches} × {rows} sequences of {config.data.seq_len} tokens"
    say("step", f"{config.optim.type}, {train.update} update, {cut} over all devices")
    say("attention", planned.attention)
    say("compiled", f"the training step in {planned.compiled.compile_s:.1f} s; nothing was run")
    if planned.by_cublas:
        say("", "all products of matrices by cuBLAS: XLA has no tiling for one, unless it can try some on a card")
    console.print(_table(planned))
    say("in place", f"{_gib(planned.compiled.in_place_bytes)} of the state are written over by the new state")
    if planned.compiled.host_bytes:
        say("host", f"{_gib(planned.compiled.host_bytes)} of the host's memory for each device")
    if train.offload_optimizer:
        say("note", "the optimizer's state is counted as if it stayed on the device; in a run train.offload_optimizer")
        say("", "keeps it in the host's memory, but for a few arrays at a time while they are updated")
    fits, why = verdict(planned, target)
    say("fits", f"{fits}: {why}")


def report_remedies(console: Console, planned: Plan, target: Target, compile_peak: Compile) -> None:
    """What would lower the peak of a plan that does not fit, each compiled with `compile_peak`, the best first."""
    say, layout, config = saying(console), planned.lm.layout, planned.program.config
    if verdict(planned, target)[0] != "no":
        return
    limit = target.memory_bytes * GPU_MEMORY_SHARE
    candidates = remedies(config, planned.accumulation.rows // layout.size("batch"), layout.mesh.shape)
    with console.status("looking for what would help") as status, quiet_libraries():
        peak = planned.compiled.peak_bytes
        found, left = tried(candidates, config, peak, compile_peak, TRY_SECONDS, status.update)
    if not found:
        compiled = candidates[: len(candidates) - len(left)]
        say("helps", f"none of what was compiled: {'; '.join(map(str, compiled)) or 'there was no time for any'}")
    for i, remedy in enumerate(found):
        say("" if i else "helps", f"{remedy}{', which fits' if (remedy.peak or 0) <= limit else ''}")
    if left:
        say("", f"not compiled within {TRY_SECONDS} s: {'; '.join(map(str, left))}")


def _table(planned: Plan) -> Table:
    peak = planned.compiled.peak_bytes
    table = Table(box=SIMPLE_HEAD, show_footer=True)
    table.add_column("on each device", "peak")
    table.add_column("GiB", f"{peak / GIB:.3f}", justify="right")
    table.add_column("share", justify="right")
    for name, held in planned.parts.items():
        table.add_row(name, f"{held / GIB:.3f}", f"{held / peak:.1%}")
    return table


def verdict(planned: Plan, target: Target) -> tuple[str, str]:
    """Whether the plan fits `target` ("yes", "no" or "unknown"), and why.

    Devices that are not here have no host: what of the state would wait there is counted as if it were on the device.
    """
    limit = target.memory_bytes * GPU_MEMORY_SHARE
    there = f"the {_gib(limit)} that a run takes of one {target.name} ({GPU_MEMORY_SHARE:.0%} of it)"
    stays, peak = planned.compiled.argument_bytes, planned.compiled.peak_bytes
    waits = planned.parts["optimizer state"] if planned.program.config.train.offload_optimizer else 0
    if planned.lm.layout.platform == "gpu":
        if peak - waits <= limit < peak:
            return "unknown", f"between {_gib(peak - waits)} and {_gib(peak)} of {there}"
        return ("yes" if peak <= limit else "no"), f"{_gib(peak)} of {there}"
    stays -= waits
    if stays > limit:
        return "no", f"between steps alone {_gib(stays)} stay, more than {there}"
    return "unknown", f"{_gib(stays)} of {there} stay between steps; the rest depends on CUDA's compiler"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"
