"""The README's page "Adding an optimizer", followed to the letter."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxllm.optim.build
from jaxllm.core.config import ByType, Section, load
from jaxllm.core.config.reference import reference
from jaxllm.core.errors import UserError
from jaxllm.optim.config import OptimizerConfig

FUNCTION = '''
import jax
import jax.numpy as jnp
import optax

def foo(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    power: int = 1,
    floor: float = 0.0,
    weight_decay: float = 0.01,
    *,
    mask=None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, each entry to a power of its own.

    Args:
        learning_rate: a number or a schedule.
        momentum: decay of the sum
            of the gradients.
        power: of the magnitude.
        floor: the smallest magnitude.
        weight_decay: decoupled.
        mask: the leaves that decay.
    """
    def shaped(updates, params):
        return jax.tree.map(lambda u: jnp.sign(u) * jnp.maximum(jnp.abs(u) ** power, floor), updates)

    decay = optax.add_decayed_weights(weight_decay, mask)
    scale = optax.scale_by_learning_rate(learning_rate)
    return optax.with_extra_args_support(optax.chain(optax.trace(momentum), optax.stateless(shaped), decay, scale))
'''


def module(monkeypatch: pytest.MonkeyPatch, name: str, file: Path, source: str) -> ModuleType:
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """`build.py` as the page changes it."""
    page = (Path(__file__).parents[2] / "README.md").read_text().partition("## Adding an optimizer\n")[2]
    line = re.search(r'`(OPTIMIZERS\.add\("foo", .*?)`', page)
    assert line is not None
    module(monkeypatch, "jaxllm.optim.foo", tmp_path / "foo.py", FUNCTION)
    source = Path(jaxllm.optim.build.__file__).read_text()
    changed = f"{source}\nfrom jaxllm.optim.foo import foo\n{line[1]}\n"
    return module(monkeypatch, "jaxllm.optim.build_with_foo", tmp_path / "build.py", changed)


def root(build: ModuleType) -> type[Section]:
    class Root(Section):
        optim: Annotated[OptimizerConfig, ByType(build.OPTIMIZERS)]

    return Root


def test_an_optimizer_is_one_file_and_one_line(build: ModuleType, tmp_path: Path) -> None:
    help_text = reference(root(build))
    assert re.search(r"optim\.momentum +0\.9 +\[foo\] Decay of the sum of the gradients\.\n", help_text)
    assert re.search(r"optim\.power +1 +\[foo\] Of the magnitude\.\n", help_text)

    config = tmp_path / "config.yaml"
    config.write_text("optim: {type: foo, learning_rate: 0.05, momentum: 0.5, schedule: {type: constant}}")
    section = load(config, [], root(build)).optim
    assert (section.momentum, section.power, section.floor, section.weight_decay) == (0.5, 1, 0.0, 0.01)
    tx, _ = build.build(section, total_steps=50)

    @jax.jit
    def losses() -> jax.Array:
        start = {"layers": {"q": {"kernel": jnp.ones((2, 4, 4))}}}

        def step(state: Any, _: None) -> Any:
            params, opt_state = state
            loss, grads = jax.value_and_grad(optax.tree.norm)(params, squared=True)
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), loss

        return jax.lax.scan(step, (start, tx.init(start)), length=50)[1]

    first, *_, last = np.asarray(losses())
    assert last < 0.01 * first


@pytest.mark.parametrize("setting", ["momentum=1.0", "momentum=-0.1", "floor=-0.1", "power=0", "power=1.5", "rho=1"])
def test_its_settings_have_bounds(build: ModuleType, tmp_path: Path, setting: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("optim: {type: foo, learning_rate: 0.001}")
    with pytest.raises(UserError, match=rf"optim\.{setting.partition('=')[0]}: "):
        load(config, [f"optim.{setting}"], root(build))
