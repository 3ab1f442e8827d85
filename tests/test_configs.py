"""Every recipe in configs/ parses, builds abstractly and lies on a mesh; every key of the config is read."""

import ast
import re
from pathlib import Path

import jax
import pytest

from jaxllm.core.config import load
from jaxllm.core.config.reference import settings
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.hf import read_model
from jaxllm.models import FAMILIES, LM
from jaxllm.models.fit_layout import fit_layout
from jaxllm.optim.build import OPTIMIZERS
from jaxllm.runs.config import Config
from jaxllm.runs.model_config import NewModel
from jaxllm.train.model import adapted
from jaxllm.train.program import Program

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_builds_abstractly_and_shards(recipe: Path, shared: Path) -> None:
    config = load(recipe, [], Config)
    layout = Layout.of(config.mesh)
    accumulation = config.train.accumulation(layout)
    if isinstance(config.model, NewModel):
        family_config = config.model.family_config(lambda: 32000)
        lm = LM(FAMILIES[family_config.type], family_config, fit_layout(family_config, layout))
    else:
        lm = read_model(shared / "models" / "stories3M", layout)
    program = Program.of(config, adapted(config, lm), config.train.steps or 1000)
    state, batch = program.state, program.batch(accumulation, config.data.seq_len)
    assert accumulation.micro_batches * accumulation.rows == config.train.batch_size
    assert all(leaf.sharding is not None for leaf in jax.tree.leaves((state, batch)))
    assert 0 < float(program.schedule(0)) <= config.optim.learning_rate
    largest = max(jax.tree.leaves((state.params, state.frozen)), key=lambda leaf: leaf.size)
    assert largest.sharding.shard_shape(largest.shape) != largest.shape, "nothing is sharded over 8 devices"


def test_every_optimizer_has_a_recipe() -> None:
    recipes = {path.stem: load(path, [], Config) for path in RECIPES if path.parent.name == "optimizers"}
    assert {name: config.optim.type for name, config in recipes.items()} == {name: name for name in OPTIMIZERS}


def test_a_misspelt_optimizer_is_answered_with_the_one_that_begins_alike() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'adamw'\?"):
        load(ROOT / "configs/finetune.yaml", ["optim.type=adamv"], Config)


def test_every_key_is_read() -> None:
    """A key that is validated, documented and read by nothing would be a lie."""
    sources = {path: path.read_text() for path in (ROOT / "jaxllm").rglob("*.py")}
    # A validator before the section is made reads a key by `values.get`.
    attributes = set(re.findall(r"\.(?:get\(\")?(\w+)", "\n".join(sources.values())))
    # The keys of an optimizer are parameters of its function.
    nodes = [n for path, text in sources.items() if path.parent.name == "optim" for n in ast.walk(ast.parse(text))]
    variables = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}

    def is_read(key: str) -> bool:
        name = key.rpartition(".")[2]
        return name == "type" or name in attributes or (key.startswith("optim.") and name in variables)

    assert [key.name for key in settings(Config) if not is_read(key.name)] == []


def test_every_key_has_a_meaning() -> None:
    plain = {"b1", "b2", "b3", "eps"}  # the optimizers' own symbols; their docstrings have the equations
    unexplained = [key.name for key in settings(Config) if not key.meaning and key.name.rpartition(".")[2] not in plain]
    assert not unexplained


def test_help_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from jaxllm.train.__main__ import main

    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {key.name} " in out for key in settings(Config))
    assert re.search(r"optim\.b3 +0\.99 +\[adan\]", out)
    assert re.search(r"optim\.learning_rate +required", out)
