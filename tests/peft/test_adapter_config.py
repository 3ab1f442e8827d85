"""`adapter_config.json`: what is wrong in it is one message with file, field and value; what HF peft takes is taken."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import save_file

from jaxllm.core.errors import UserError
from jaxllm.peft.adapter import read_adapter

SETTINGS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], rank_pattern={"q_proj": 2}),
    "adalora": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9),
    "ia3": peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8),
}

# What a field may hold, by its name; the others may hold text.
WHOLE = {
    *("deltaT", "encoder_hidden_size", "init_r", "num_attention_heads", "num_layers", "num_transformer_submodules"),
    *("num_virtual_tokens", "qalora_group_size", "r", "target_r", "tfinal", "tinit", "token_dim", "total_step"),
}
NUMBERS = {"beta1", "beta2", "lora_alpha", "lora_dropout", "orth_reg_weight"}
YES_OR_NO = {
    *("ensure_weight_tying", "inference_mode", "init_ia3_weights", "init_lora_weights", "prefix_projection"),
    *("use_dora", "use_rslora"),
}
MAPPINGS = {
    *("alpha_pattern", "auto_mapping", "corda_config", "eva_config", "loftq_config", "lora_ga_config", "rank_pattern"),
    "tokenizer_kwargs",
}
NOTHING = WHOLE | {
    *("bias", "exclude_modules", "layers_to_transform", "modules_to_save", "peft_type"),
    *("target_parameters", "task_type", "trainable_token_indices"),
}

WRONG: dict[str, Any] = {
    "a mapping": {"a": 1},
    "nested lists": [[1], ["a", {}]],
    "mixed": ["q_proj", 3],
    "negative": -1,
    "huge": 10**12,
    "beyond 64 bits": 10**40,
    "infinite": float("inf"),
    "NaN": float("nan"),
    "a fraction": 0.123,
    "text": "some text",
    "true": True,
}


def may_hold(name: str) -> set[str]:
    """The kinds of WRONG that the field may hold after all."""
    for names, kind in ((NUMBERS, "a fraction"), (YES_OR_NO, "true"), (MAPPINGS, "a mapping")):
        if name in names:
            return {kind}
    return set() if name in NOTHING else {"text"}


@pytest.fixture
def write(tmp_path):
    """Writes the files of an adapter, and gives its folder."""
    save_file({"base_model.model.x": np.zeros(1, np.float32)}, tmp_path / "adapter_model.safetensors")

    def write(content: dict[str, Any]) -> Path:
        plain = json.dumps(content, default=lambda value: sorted(value) if isinstance(value, set) else str(value))
        (tmp_path / "adapter_config.json").write_text(plain)
        return tmp_path

    return write


@pytest.mark.parametrize("method", SETTINGS)
def test_a_wrong_value_of_any_field_is_one_message(method, write):
    settings = {**SETTINGS[method].to_dict(), "task_type": "CAUSAL_LM"}
    assert read_adapter(write(settings)).method.files.peft_type == settings["peft_type"]
    for name in settings:
        for kind, value in WRONG.items():
            folder = write({**settings, name: value})
            try:
                read_adapter(folder)
            except UserError as error:
                message = str(error)
                assert message.startswith(f"{folder / 'adapter_config.json'}: "), (name, kind, message)
                assert name in message, (name, kind, message)
                assert len(message) < 600, (name, kind, message)
            else:
                assert kind in may_hold(name), (name, kind)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(r=10**12), "r is 1000000000000: must be at most 65536"),
        (dict(r="8"), 'r is "8": must be a whole number'),
        (dict(lora_alpha=float("inf")), "lora_alpha is Infinity"),
        (dict(lora_alpha=1e300), "lora_alpha is 1e.300"),
        (dict(lora_alpha=float("nan")), "lora_alpha is NaN"),
        (dict(rank_pattern={"q_proj": 10**12}), "rank_pattern is .*1000000000000"),
        (dict(trainable_token_indices={"embed_tokens": 3}), "trainable_token_indices is .*embed_tokens"),
        (dict(trainable_token_indices=[[1], [1]]), "trainable_token_indices is .*1.*, .*1"),
        (dict(layers_to_transform=[0, -1]), "layers_to_transform is .*-1"),
        (dict(layers_to_transform=True), "layers_to_transform is true"),
        (dict(target_modules=None), "target_modules is missing, and says which matrices"),
        (dict(layers_pattern="h"), 'layers_pattern is "h", and the layers of the models .* are called layers'),
        (dict(init_lora_weights="olora"), "olora.*also changes the base model; save .* or merge it there"),
        (dict(init_lora_weights="pissa_niter_4"), "also changes the base model"),
        (dict(init_lora_weights="magic"), 'init_lora_weights is "magic"; known: true, false, gaussian, eva'),
        (dict(lora_bias=True), r"lora_bias is true, which is not implemented; merge .*\(merge_and_unload\)"),
    ],
)
def test_values_that_are_refused(changes, message, write):
    with pytest.raises(UserError, match=f"adapter_config.json: .*{message}"):
        read_adapter(write({**SETTINGS["lora"].to_dict(), **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        *(dict(init_lora_weights=kind) for kind in (True, False, None, "gaussian", "Gaussian", "orthogonal", "mica")),
        dict(init_lora_weights="eva", eva_config={"rho": 2.0, "use_label_mask": True}),
        dict(layers_pattern=["layers"]),
        dict(layers_pattern="h", layers_to_transform=None),
        dict(layers_to_transform=1),
    ],
)
def test_values_that_are_taken(changes, write):
    assert read_adapter(write({**SETTINGS["lora"].to_dict(), **changes})).method.r == 8
