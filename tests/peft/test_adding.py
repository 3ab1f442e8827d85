"""The page "Adding a method" of the room's README, followed to the letter."""

import re
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import peft as hf_peft
import pytest

import jaxllm.peft
from jaxllm.core import tree
from jaxllm.core.config import ByType, Section, load
from jaxllm.core.config.reference import reference
from jaxllm.core.errors import UserError
from jaxllm.peft import METHODS, PeftConfig
from jaxllm.peft.adapter import read_adapter, with_adapter
from tests.optim.test_adding import module
from tests.support.adapters import TOLERANCE, logits, model, torch_logits
from tests.support.families import transformers_model
from tests.support.small_runs import llama, on_host, program, run

ROOM = Path(jaxllm.peft.__file__).parent
PAGE = (ROOM / "README.md").read_text().partition("## Adding a method\n")[2]


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Any]:
    """A config whose methods are ours and that of the page, which is registered for the test alone."""
    source = re.search(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert source is not None
    assert "`from jaxllm.peft import lora_fa as lora_fa`" in PAGE
    before = [*METHODS]
    monkeypatch.setattr(METHODS, "_entries", {name: METHODS[name] for name in before})
    module(monkeypatch, "jaxllm.peft.lora_fa", tmp_path / "lora_fa.py", source[1])
    assert [*METHODS] == [*before, "lora_fa"]

    class Root(Section):
        peft: Annotated[PeftConfig, ByType(METHODS)]

    return Root


@pytest.fixture
def method(root: type[Any], tmp_path: Path) -> PeftConfig:
    config = tmp_path / "config.yaml"
    config.write_text("peft: {type: lora_fa, r: 3, target_modules: [q_proj, down_proj]}")
    return load(config, [], root).peft


def test_its_keys_are_documented_and_have_bounds(root: type[Any], tmp_path: Path) -> None:
    help_text = reference(root)
    assert re.search(r"peft\.r +8 +\[lora_fa\] rank of the added matrices\n", help_text)
    assert re.search(
        r"peft\.target_modules +\"all-linear\" +\[lora_fa\] the matrices that get them: all-linear", help_text
    )
    config = tmp_path / "config.yaml"
    config.write_text("peft: {type: lora_fa}")
    for setting in ("r=0", "lora_alpha=-1", "use_dora=true", "target_modules='(('"):
        with pytest.raises(UserError, match=r"peft"):
            load(config, [f"peft.{setting}"], root)


def test_the_second_matrix_alone_trains(method: PeftConfig) -> None:
    made = program(llama(), method=method)
    before = on_host(made, made.start())
    state, metrics = run(made, made.start(), range(8))
    after = on_host(made, state)
    trained = {f"params/layers/{matrix}/lora_b" for matrix in ("attn/q", "mlp/down")}
    assert {path for path in after if path.startswith("params/")} == trained
    assert all(not np.array_equal(before[path], after[path]) for path in trained)
    assert metrics["loss"][-4:].mean() < metrics["loss"][:4].mean()  # on the same four batches


def test_its_adapter_loads_in_hf_peft_and_comes_back(method: PeftConfig, tmp_path: Path) -> None:
    lm, base = model()
    adapted = method.add(lm)
    params = jax.jit(adapted.with_extra)(base, jax.random.key(0))
    for path, leaf in tree.flatten(params).items():
        if path.endswith("/lora_b"):
            params = tree.insert(params, {path: leaf + 0.1})
    ours = logits(adapted, params)
    assert np.abs(ours - logits(lm, base)).max() > 0.1
    method.export(adapted, params, tmp_path / "adapter", model_folder=tmp_path, base="base")
    theirs_base = transformers_model(lm.config, base, tmp_path / "base")
    theirs = torch_logits(hf_peft.PeftModel.from_pretrained(theirs_base, tmp_path / "adapter").eval())
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    assert read_adapter(tmp_path / "adapter").method.type == "lora"
    merged = with_adapter(tmp_path / "adapter", lm, lambda: base)()
    np.testing.assert_allclose(logits(lm, merged), ours, atol=TOLERANCE)
