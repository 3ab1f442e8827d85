"""Who may import whom: the table of the design, asserted over the syntax trees of the package."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxllm"

# Room → rooms that it may import, and whatever those may import. A room is a folder or a file named here. The
# files of optim/ beside OPTIM_FILES are transforms that anyone can use elsewhere.
MAY_IMPORT = {
    "core": [],
    "files": ["core"],
    "processes": ["core"],
    "kernels": ["core"],
    "objectives": ["core"],
    "nn": ["core", "kernels", "objectives"],
    "models": ["nn"],
    "hf": ["models", "files"],
    "peft": ["hf"],
    "data": ["core", "files"],
    "generate": ["models", "data"],
    "checkpoint": ["core", "processes"],
    "evaluate": ["models", "data", "generate"],
    "optim/<name>": [],
    "optim": ["core", "optim/<name>"],
    "step/state": ["core"],
    "step": ["models", "optim", "peft", "step/state"],
    "callbacks": ["step/state", "checkpoint", "evaluate", "processes"],
    "runs": ["callbacks", "peft", "optim", "data", "checkpoint", "processes", "files"],
}
OPTIM_FILES = ["__init__", "build", "config", "curvature", "schedule_config", "wrapped", "wrappers"]
# These may import everything, and only they may import one another.
SEE_EVERYTHING = ["__init__", "train", "convert", "plan", "prepare", "report", "serve", "doctor", "__main__"]

# Top-level modules → the only rooms and files that may import them; none: nobody.
RESERVED = {
    "flax": ["nn", "models"],
    "torch": [],
    "peft": [],
    "bitsandbytes": [],
    "pickle": [],
    "cloudpickle": [],
    "dill": [],
    "marshal": [],
    "shelve": [],
    "joblib": [],
}
# Rooms → the third-party modules that they may not, or may alone, import.
WITHOUT = {"data": ["jax", "jaxlib", "flax", "optax", "orbax"]}
WITHOUT_EXCEPT = ["data/rows/loader"]
ALONE = {"optim/<name>": ["jax", "optax", "numpy"]}


@dataclass(frozen=True)
class Import:
    """An import in `file` (such as `data/rows/pack`) of a module: a file too if it is ours, else its top name."""

    file: str
    line: int
    target: str
    ours: bool


def room_of(file: str) -> str:
    """The room of `file`, a path in the package without `.py`."""
    folder, _, rest = file.partition("/")
    if file in MAY_IMPORT or file in SEE_EVERYTHING:
        return file
    if folder in SEE_EVERYTHING or file.endswith("__main__"):
        return "__main__" if file.endswith("__main__") else folder
    if folder == "optim" and rest not in OPTIM_FILES:
        return "optim/<name>"
    return folder


def closure(room: str) -> set[str]:
    """The rooms whose files `room` may import."""
    if room in SEE_EVERYTHING:
        return {*MAY_IMPORT, *SEE_EVERYTHING}
    return {room}.union(*(closure(other) for other in MAY_IMPORT[room]))


def imports_of(file: str, source: str, files: set[str]) -> Iterator[Import]:
    """Every import in `source`, those inside functions and those by a literal name too."""

    def resolve(module: str, line: int, name: str = "") -> Import:
        top, *folders = module.split(".")
        if top != "jaxllm":
            return Import(file, line, top, ours=False)
        for parts in ([*folders, name], [*folders, name, "__init__"], folders):
            if "/".join(parts) in files:
                return Import(file, line, "/".join(parts), ours=True)
        return Import(file, line, "/".join([*folders, "__init__"]), ours=True)

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from {resolve(alias.name, node.lineno) for alias in node.names}
            case ast.ImportFrom():
                parents = ["jaxllm", *file.split("/")][: -node.level] if node.level else []
                module = ".".join([*parents, *filter(None, [node.module])])
                yield from {resolve(module, node.lineno, alias.name) for alias in node.names}
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                yield resolve(module, node.lineno)
            case _:
                pass


def violations(sources: dict[str, str]) -> list[str]:
    """What breaks the tables in a package of `sources`: file without `.py` → text."""
    files, found = set(sources), []
    graph: dict[str, set[str]] = {file: set() for file in files}
    for file, source in sources.items():
        room = room_of(file)
        if room not in MAY_IMPORT and room not in SEE_EVERYTHING:
            found.append(f"{file}: the room {room} is not in the table")
            continue
        for i in imports_of(file, source, files):
            where = f"{file}.py:{i.line}: {room}"
            if i.ours:
                graph[file].add(i.target)
                if room_of(i.target) not in closure(room):
                    found.append(f"{where} may not import {i.target}")
                continue
            if i.target in RESERVED and room not in RESERVED[i.target]:
                found.append(f"{where} may not import {i.target}, which {RESERVED[i.target] or 'nobody'} may")
            if i.target in WITHOUT.get(room, []) and file not in WITHOUT_EXCEPT:
                found.append(f"{where} may not import {i.target}")
            if room in ALONE and i.target not in ALONE[room] and i.target not in sys.stdlib_module_names:
                found.append(f"{where} may import {ALONE[room]} alone, not {i.target}")
    return found + [f"cycle: {' → '.join(cycle)}" for cycle in cycles(graph)]


def cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """One path for each edge that closes a cycle in a depth-first walk."""
    done: set[str] = set()

    def walk(file: str, path: list[str]) -> Iterator[list[str]]:
        if file in path:
            yield [*path[path.index(file) :], file]
        elif file not in done:
            for target in sorted(graph.get(file, ())):
                yield from walk(target, [*path, file])
            done.add(file)

    for file in sorted(graph):
        yield from walk(file, [])


def test_the_package_keeps_the_table():
    sources = {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }
    assert len(sources) > 20
    assert violations(sources) == []


# A small package that keeps the table; each case below breaks one rule of it.
GOOD = {
    "__init__": "from jaxllm import optim",
    "core/tree": "import jax",
    "core/mesh": "from jaxllm.core import tree",
    "kernels/attention": "import jax",
    "nn/linear": "import flax.linen as nn\nfrom jaxllm.kernels.attention import attention",
    "models/lm": "from jaxllm.nn import linear\nfrom jaxllm.core.tree import Params",
    "hf/weights": "import jaxllm.models.lm",
    "peft/lora": "from jaxllm.hf.weights import load",
    "generate/decode": "from jaxllm.models.lm import LM",
    "data/rows/pack": "import numpy as np",
    "data/rows/loader": "import jax\nfrom . import pack",
    "checkpoint/store": "import orbax.checkpoint\nfrom jaxllm.core.tree import Params",
    "evaluate/perplexity": "from jaxllm.data.rows.loader import batches\nfrom jaxllm.generate import decode",
    "optim/__init__": "from jaxllm.optim.lomo import lomo",
    "optim/lomo": "from typing import Any\nimport jax.numpy as jnp\nimport optax",
    "optim/schedule": "import optax",
    "optim/build": "from jaxllm import optim\nfrom jaxllm.core.mesh import Layout",
    "step/state": "from jaxllm.core.tree import Params",
    "step/update": "from jaxllm.optim.build import build\nfrom jaxllm.step.state import TrainState",
    "runs/config": "from jaxllm.callbacks.save import Save",
    "train/run": "from jaxllm.callbacks.save import Save\nfrom jaxllm.step.update import make_step",
    "train/__main__": "from jaxllm.train.run import run",
    "callbacks/save": "from jaxllm.checkpoint.store import Store\nfrom jaxllm.step.state import Event",
    "serve/server": "from jaxllm.train.run import run\nfrom jaxllm.generate.decode import decode",
}


def test_a_package_that_keeps_the_table_has_no_violation():
    assert violations(GOOD) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("core/tree", "import jaxllm.nn.linear", "core may not import nn/linear"),
        ("nn/linear", "from jaxllm.models import lm", "nn may not import models/lm"),
        ("models/lm", "from ..hf import weights", "models may not import hf/weights"),
        ("models/lm", "def f():\n    import jaxllm.optim", "models may not import optim/__init__"),
        ("hf/weights", "from jaxllm.peft.lora import add", "hf may not import peft/lora"),
        ("generate/decode", "import jaxllm.hf.weights", "generate may not import hf/weights"),
        ("data/rows/pack", "from jaxllm.models.lm import LM", "data may not import models/lm"),
        ("data/rows/pack", "import jax.numpy as jnp", "data may not import jax"),
        ("checkpoint/store", "from jaxllm.step.state import X", "checkpoint may not import step/state"),
        ("evaluate/perplexity", "import jaxllm.optim.lomo", "evaluate may not import optim/lomo"),
        ("optim/lomo", "from jaxllm.core import tree", "optim/<name> may not import core/tree"),
        ("optim/schedule", "import flax.struct", "optim/<name> may not import flax, which"),
        (
            "optim/schedule",
            "import chex",
            "optim/<name> may import ['jax', 'optax', 'numpy'] alone, not chex",
        ),
        ("optim/build", "from jaxllm.models.lm import LM", "optim may not import models/lm"),
        ("step/update", "from jaxllm.callbacks.save import Save", "step may not import callbacks/save"),
        ("step/update", "from jaxllm.data.rows.loader import batches", "step may not import data/rows/loader"),
        ("step/update", "import jaxllm.train.run", "step may not import train/run"),
        ("step/update", "import jaxllm.runs.config", "step may not import runs/config"),
        ("runs/config", "import jaxllm.step.update", "runs may not import step/update"),
        ("runs/config", "import jaxllm.train.run", "runs may not import train/run"),
        ("step/state", "import jaxllm.step.update", "step/state may not import step/update"),
        ("callbacks/save", "from jaxllm.step.update import S", "callbacks may not import step/update"),
        ("callbacks/save", "import jaxllm", "callbacks may not import __init__"),
        ("core/mesh", "import flax", "core may not import flax, which ['nn', 'models'] may"),
        ("serve/server", "import torch", "serve may not import torch, which nobody may"),
        (
            "hf/weights",
            "def f():\n    from peft import LoraConfig",
            "hf may not import peft, which nobody may",
        ),
        ("core/tree", "import pickle", "core may not import pickle, which nobody may"),
        ("core/tree", "import importlib\nimportlib.import_module('dill')", "core may not import dill, which"),
        ("core/tree", "__import__('cloudpickle.x')", "core may not import cloudpickle, which nobody may"),
        ("core/tree", "from jaxllm.core import mesh", "cycle: core/tree → core/mesh → core/tree"),
        ("attic/old", "import jax", "attic/old: the room attic is not in the table"),
    ],
)
def test_each_rule_has_teeth(file, source, message):
    found = violations({**GOOD, file: source})
    assert any(message in line for line in found), found
