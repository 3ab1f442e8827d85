"""Freezing by pattern, and training the biases alone, in whole runs."""

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.peft import METHODS
from jaxllm.runs.open import open_model
from tests.support.families import draw_config, draw_params, small_lm
from tests.support.whole_runs import read_metrics, train, workplace

NO_BIAS = dict(attention_bias=False, mlp_bias=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared):
    folder = tmp_path_factory.mktemp("freeze")
    with workplace(folder, shared) as config:
        yield folder, config


def leaves(folder) -> dict[str, np.ndarray]:
    model = open_model(folder, Layout.single())
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(model.load()).items()}


def changed(before, after) -> set[str]:
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_what_is_frozen_keeps_its_bits(place):
    """Through decay, momentum, accumulation, a kill and a resume; and the run, its checkpoint and its export agree."""
    folder, config = place
    frozen = ["peft.type=freeze", "peft.train=['layers/*', 'norm/*']", "peft.freeze=['*/q/kernel', '*/mlp/*']"]
    run = folder / "frozen"
    assert train(config, f"output_dir={run}", *frozen, "train.steps=8").status == 0
    half = leaves(run / "checkpoints" / "4")
    assert train(config, f"output_dir={run}", *frozen).status == 0
    after = leaves(run)
    moved = {
        path
        for path in after
        if path.startswith(("layers/attn", "layers/mlp_norm", "norm/")) and not path.endswith("q/kernel")
    }
    assert changed(half, after) == moved
    _, exported = jaxllm.load_hf(run / "export" / "hf")
    for path, leaf in tree.flatten(exported).items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)
    assert read_metrics(run)[-1]["step"] == 12


def test_biases_alone(place):
    folder, config = place
    run = folder / "biases"
    bitfit = ["peft.type=bitfit", "model.attention_bias=true", "train.update=fused"]
    assert train(config, f"output_dir={run}", *bitfit).status == 0
    before, after = leaves(run / "checkpoints" / "8"), leaves(run)
    assert changed(before, after) == {f"layers/attn/{name}/bias" for name in "qkvo"}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "bitfit"}, "trains the biases, and this llama model has none"),
        ({"type": "freeze", "freeze": ("embed/tabel",)}, "matches no parameter. Did you mean 'embed/table'"),
        ({"type": "freeze", "freeze": ("*",)}, "leaves nothing to train"),
        ({"type": "freeze"}, "nothing is frozen"),
    ],
)
def test_what_cannot_train_is_refused(section, message):
    with pytest.raises((UserError, ValueError), match=message):
        METHODS[section["type"]].model_validate(section).mask(small_lm(draw_config("llama", 0, **NO_BIAS)))


def test_the_mask_covers_the_model():
    lm = small_lm(draw_config("llama", 0, attention_bias=True, tie_word_embeddings=False))
    for section in ({"type": "full"}, {"type": "bitfit"}, {"type": "freeze", "freeze": ("head/*",)}):
        mask = METHODS[section["type"]].model_validate(section).mask(lm)
        assert jax.tree.structure(mask) == jax.tree.structure(draw_params(lm))
