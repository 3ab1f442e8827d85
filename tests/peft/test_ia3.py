"""IA³ against HF peft, merged and unmerged, and in a whole run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

import jaxllm
from jaxllm.convert.__main__ import main as convert
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.peft.adapter import read_adapter, with_adapter
from jaxllm.peft.ia3 import Ia3
from jaxllm.peft.merge import merge
from tests.support.adapters import TOLERANCE, dear, logits, model, torch_logits
from tests.support.families import transformers_model
from tests.support.whole_runs import train, workplace

VARIANTS: dict[str, dict[str, Any]] = {
    "default": dict(),
    "some layers": dict(target_modules=r".*layers\.1\..*(q|up)_proj", feedforward_modules=".*up_proj"),
    "modules to save": dict(target_modules=("o_proj",), feedforward_modules=(), modules_to_save=("lm_head",)),
}


@pytest.mark.parametrize("variant", dear(VARIANTS, "some layers"))
def test_its_files_load_in_hf_peft_and_come_back(variant, tmp_path):
    lm, base = model(num_attention_heads=8, num_key_value_heads=2)
    method, rng = Ia3(type="ia3", **VARIANTS[variant]), np.random.default_rng(1)
    adapted = method.add(lm)
    params = adapted.with_extra(base, jax.random.key(0))
    np.testing.assert_array_equal(logits(adapted, params), logits(lm, base))
    chosen = tree.flatten(method.mask(adapted))
    moved = {
        path: leaf * jnp.asarray(1 + 0.4 * rng.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in tree.flatten(params).items()
        if chosen[path]
    }
    params = tree.insert(params, moved)
    ours = logits(adapted, params)
    assert np.abs(ours - logits(lm, base)).max() > 0.1
    method.export(adapted, params, tmp_path / "adapter", model_folder=tmp_path, base="base")
    theirs = peft.PeftModel.from_pretrained(
        transformers_model(lm.config, base, tmp_path / "base"), tmp_path / "adapter"
    )
    np.testing.assert_allclose(ours, torch_logits(theirs), atol=TOLERANCE)
    back = with_adapter(tmp_path / "adapter", lm, lambda: base, method)()
    np.testing.assert_array_equal(logits(adapted, back), ours)
    np.testing.assert_allclose(logits(lm, merge(params)), ours, atol=TOLERANCE)


def test_files_of_hf_peft_load_and_merge(tmp_path):
    """With the modules that peft takes where none are named, and biases that are multiplied too."""
    lm, base = model(num_attention_heads=8, num_key_value_heads=2)
    theirs = peft.get_peft_model(
        transformers_model(lm.config, base, tmp_path / "base"), peft.IA3Config(task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "ia3_l" in name:
                weight *= 1 + 0.4 * torch.randn(weight.shape)
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = torch_logits(theirs.eval())
    assert read_adapter(tmp_path / "adapter").method.computes(lm) == Ia3(type="ia3").computes(lm)
    np.testing.assert_allclose(
        logits(lm, with_adapter(tmp_path / "adapter", lm, lambda: base)()), wanted, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(target_modules=("c_attn",), feedforward_modules=()), "matches no matrix of the model"),
        (
            dict(target_modules=("lm_head",), feedforward_modules=()),
            "means lm_head, which is in no layer",
        ),
        (dict(feedforward_modules=("up_proj",)), "has 'up_proj', which target_modules has not"),
        (dict(feedforward_modules=r".*layers\.0\..*"), "means k_proj in some of its layers only"),
        (dict(target_modules="(q_proj"), "no regular expression"),
    ],
)
def test_what_cannot_be_added_is_refused(settings, message):
    lm, _ = model()
    with pytest.raises((UserError, ValueError), match=message):
        Ia3(type="ia3", **settings).add(lm)


def test_a_run(tmp_path_factory, shared):
    folder = tmp_path_factory.mktemp("ia3")
    with workplace(folder, shared) as config:
        base, run = shared / "models/stories260K", folder / "run"
        section = ["peft.type=ia3", f"model={{path: {base}}}", "train.update=fused", "optim.weight_decay=0"]
        ran = train(config, f"output_dir={run}", *section)
        losses = [line["eval/held_out/loss"] for line in ran.metrics() if "eval/held_out/loss" in line]
        assert losses[-1] < losses[0] - 0.005
        assert convert(["merge", str(base), str(run), str(folder / "merged")]) == 0
        assert convert(["to-hf", str(run), str(folder / "of_run")]) == 0
        merged = jaxllm.load_hf(folder / "merged")[1]
        for path, leaf in tree.flatten(jaxllm.load_hf(folder / "of_run")[1]).items():
            np.testing.assert_array_equal(leaf, tree.at(merged, path), err_msg=path)
