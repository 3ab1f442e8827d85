"""Adapters beside matrices that are several in one (Phi-3), against HF peft.

Their files have the rows in another order than the model has its columns."""

from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch

from jaxllm.core import tree
from jaxllm.peft.adalora import AdaLora
from jaxllm.peft.adapter import read_adapter, with_adapter
from jaxllm.peft.ia3 import Ia3
from jaxllm.peft.lora import Lora
from jaxllm.peft.merge import merge
from tests.support.adapters import TOLERANCE, dear, logits, model, torch_logits
from tests.support.families import mesh_layout, on_layout, transformers_model

FUSED = ["qkv_proj", "gate_up_proj"]
# The section here, and the same as HF peft has it.
METHODS: dict[str, tuple[Any, Any]] = {
    "lora": (
        Lora(type="lora", r=4, lora_alpha=16.0, target_modules=("qkv_proj",), modules_to_save=("gate_up_proj",)),
        lambda: peft.LoraConfig(r=4, lora_alpha=16, target_modules=["qkv_proj"], modules_to_save=["gate_up_proj"]),
    ),
    "dora": (
        Lora(type="lora", r=3, use_dora=True),
        lambda: peft.LoraConfig(r=3, use_dora=True, target_modules="all-linear"),
    ),
    "adalora": (
        AdaLora(type="adalora", init_r=3, target_r=2, target_modules=tuple(FUSED)),
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=FUSED),
    ),
    "ia3": (
        Ia3(type="ia3", target_modules=("qkv_proj", "down_proj"), feedforward_modules=("down_proj",)),
        lambda: peft.IA3Config(target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
}


@pytest.mark.parametrize("name", dear(METHODS, "lora", "ia3"))
def test_files_go_both_ways(name, tmp_path):
    """Those that theirs has trained load here and are the same logits, on a mesh too; merged also; and come back."""
    lm, base = model("phi3", num_attention_heads=8, num_key_value_heads=2)
    method, settings = METHODS[name]
    theirs = settings()
    theirs.task_type = "CAUSAL_LM"
    module = peft.get_peft_model(transformers_model(lm.config, base, tmp_path / "base"), theirs)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in (weight for weight in module.parameters() if weight.requires_grad):
            weight += 0.2 * torch.randn(weight.shape)
    module.save_pretrained(tmp_path / "theirs")
    wanted = torch_logits(module.eval())
    assert np.abs(wanted - logits(lm, base)).max() > 0.1

    read = read_adapter(tmp_path / "theirs").method
    params = with_adapter(tmp_path / "theirs", lm, lambda: base, read)()
    adapted = read.add(lm)
    np.testing.assert_allclose(logits(adapted, params), wanted, atol=TOLERANCE)
    assert read.computes(lm) == method.computes(lm)
    np.testing.assert_allclose(logits(lm, merge(params)), wanted, atol=TOLERANCE)
    sharded, placed = on_layout(adapted, mesh_layout(tensor=2, fsdp=2), params)
    np.testing.assert_allclose(logits(sharded, placed), wanted, atol=TOLERANCE)

    read.export(adapted, params, tmp_path / "ours", model_folder=tmp_path, base="base")
    again = peft.PeftModel.from_pretrained(transformers_model(lm.config, base, tmp_path / "again"), tmp_path / "ours")
    np.testing.assert_allclose(torch_logits(again.eval()), wanted, atol=TOLERANCE)
    back = with_adapter(tmp_path / "ours", lm, lambda: base, read)()
    for path, leaf in tree.flatten(params).items():
        np.testing.assert_array_equal(tree.at(back, path), leaf, err_msg=path)


def test_pissa_starts_without_changing_anything_and_loads_in_hf_peft(tmp_path):
    lm, base = model("phi3")
    method = Lora(type="lora", r=2, init_lora_weights="pissa", target_modules=tuple(FUSED))
    adapted = method.add(lm)
    params = jax.jit(adapted.with_extra)(base, jax.random.key(0))
    np.testing.assert_allclose(logits(adapted, params), logits(lm, base), atol=2e-5)
    path, rng = "layers/attn/qkv/lora_b", np.random.default_rng(0)
    start = tree.at(params, path)
    params = tree.insert(params, {path: start + 0.2 * rng.normal(size=start.shape).astype(np.float32)})
    method.export(adapted, params, tmp_path / "adapter", model_folder=tmp_path, base="base")
    theirs = peft.PeftModel.from_pretrained(transformers_model(lm.config, base, tmp_path / "b"), tmp_path / "adapter")
    np.testing.assert_allclose(torch_logits(theirs.eval()), logits(adapted, params), atol=TOLERANCE)
