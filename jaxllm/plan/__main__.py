"""`python -m jaxllm.plan CONFIG.yaml [section.key=value …]`: the memory of a run on a GPU that is not here."""

import argparse
import os
import sys

from jaxllm.core.command import exit_status
from jaxllm.core.errors import UserError
from jaxllm.core.hardware import TARGETS
from jaxllm.plan.targets import missing_wheels, target_named
from jaxllm.processes.environment import quiet_libraries, without_idle_cuda, without_torch

DESCRIPTION = """Compiles the training step of CONFIG.yaml for a GPU that need not be here, and prints what each device
would hold of it: parameters, optimizer state, batch, what lives while the step runs, the peak, and whether that fits
the card. The step is the one that `python -m jaxllm.train` with the same arguments would run, on the same mesh. Of
the model only config.json or its section is read, and the tokenizer where it alone tells the vocabulary; no data is."""
EPILOG = """Needs CUDA's compiler, not CUDA: pip install 'jaxllm[plan]'. Without it the step is compiled for simulated
CPU devices, which tells what a device holds between steps, and little of what it holds within one. The figures are the
compiler's, not measured: at run time cuBLAS and NCCL take memory too, from the part of the card that a run leaves
free."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxllm.plan",
        usage="%(prog)s CONFIG.yaml [section.key=value ...] [--gpu GPU] [--devices N]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="a config of jaxllm.train")
    parser.add_argument(
        "changes", nargs="*", metavar="section.key=value", help="changes a value of it, as in jaxllm.train"
    )
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(TARGETS)} (default h100)")
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="how many of them (default: as many as the mesh names, an axis of -1 being 1)",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 planned, whether it fits or not; 2 wrong input; 130 interrupted."""
    return exit_status(lambda: _plan(_parser().parse_intermixed_args(arguments)))


def _plan(options: argparse.Namespace) -> None:
    target = target_named(options.gpu)
    if options.devices is not None and options.devices < 1:
        raise UserError(f"--devices must be at least 1, got {options.devices}")
    with quiet_libraries():  # which say that no GPU is here
        from rich.console import Console

        from jaxllm.core.config import load
        from jaxllm.plan.plan import devices_for, plan
        from jaxllm.plan.report import report, report_devices, report_remedies
        from jaxllm.runs.config import Config

        config = load(options.config, options.changes, Config)
        missing = missing_wheels()
        devices = devices_for(config.mesh, None if missing else target, options.devices)
    console = Console()
    report_devices(console, target, missing)
    with console.status("compiling the training step"), quiet_libraries():
        planned = plan(config, devices)
    report(console, planned, target)

    def compile_peak(changed: Config) -> int:
        count = options.devices if changed.mesh == config.mesh else None
        return plan(changed, devices_for(changed.mesh, None if missing else target, count)).compiled.peak_bytes

    report_remedies(console, planned, target, compile_peak)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # a GPU that is here stays free
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    without_torch()
    if missing_wheels():
        without_idle_cuda()
    sys.exit(main(sys.argv[1:]))
