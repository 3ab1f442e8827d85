"""`python -m jaxllm.convert`: checkpoints of runs, as folders for transformers."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxllm.core.command import exit_status
from jaxllm.processes.environment import without_idle_cuda, without_torch

DTYPES = ("float32", "bfloat16", "float16")
SOURCES = (
    "a run's folder (its newest checkpoint), <run>/checkpoints/<step> (or /best), a Hugging Face folder, or a model of "
    "the Hub: owner/name, or the URL of a Hugging Face folder"
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxllm.convert", description="Converts checkpoints. Works on the CPU, whatever GPU there is."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    to_hf = commands.add_parser(
        "to-hf",
        help="write a Hugging Face folder",
        description="Writes the weights, config.json, tokenizer and generation settings of SRC into the folder DST, "
        "which transformers loads. An older export in DST is replaced; one that holds anything else is refused.",
    )
    to_hf.add_argument("src", help=SOURCES)
    to_hf.set_defaults(run=lambda options: _to_hf(options.src, options.dst, options.dtype))
    merge = commands.add_parser(
        "merge",
        help="write a model and its adapters as one",
        description="Merges the adapters into their model BASE, one after the other, and writes the result into the "
        "folder DST, which transformers loads.",
    )
    merge.add_argument("base", help=SOURCES)
    adapter = "a folder of HF peft's files, or of a run that has trained one"
    merge.add_argument("adapters", metavar="adapter", nargs="+", type=Path, help=adapter)
    merge.set_defaults(run=lambda options: _to_hf(options.base, options.dst, options.dtype, options.adapters))
    for writes in (to_hf, merge):
        writes.add_argument("dst", type=Path, help="the folder to write")
        writes.add_argument(
            "--dtype", choices=DTYPES, help="of the weights that are written (default: as they are stored)"
        )
    inspect = commands.add_parser(
        "inspect",
        help="say what a model is",
        description="Says what SRC is: its family and shape, and the path, shape and dtype of each parameter.",
    )
    inspect.add_argument("src", help=SOURCES)
    inspect.set_defaults(run=lambda options: _inspect(options.src))
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command. Returns its exit status: 0 done, 2 wrong input, 130 interrupted."""

    def convert() -> None:
        options = _parser().parse_args(arguments)
        options.run(options)

    return exit_status(convert, interrupted="interrupted; nothing was written")


def _to_hf(src: str, dst: Path, dtype: str | None, adapters: Sequence[Path] = ()) -> None:
    from jaxllm.core.mesh import Layout
    from jaxllm.hf.export import check_replaceable, save
    from jaxllm.peft.adapter import with_adapter
    from jaxllm.runs.open import open_model

    model = open_model(src, Layout.single(), dtype)
    model.check_whole()
    check_replaceable(dst, model.lm.source)
    load = model.load
    for adapter in adapters:
        model.check_lacks(adapter)
        load = with_adapter(adapter, model.lm, load)
    save(model.lm, load(), dst, model_folder=model.folder)
    print(f"{dst}: {model.lm.parameter_count():,} parameters, for transformers")


def _inspect(src: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxllm.core import tree
    from jaxllm.core.mesh import Layout
    from jaxllm.runs.open import open_model

    lm = open_model(src, Layout.single()).lm
    leaves = tree.flatten(lm.abstract())
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())
    console = Console()
    console.print(f"{lm.config.type}: {lm.parameter_count():,} parameters, {total / 1e9:.3f} GB")
    fields = lm.config.model_dump(exclude={"type"})
    console.print(", ".join(f"{name} {value}" for name, value in fields.items()), soft_wrap=True)
    table = Table("parameter", "shape", "dtype")
    for path, leaf in leaves.items():
        table.add_row(path, " × ".join(map(str, leaf.shape)), leaf.dtype.name)
    console.print(table)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # a host's memory holds what one GPU does not
    without_torch()
    without_idle_cuda()
    sys.exit(main(sys.argv[1:]))
