"""Adapters in the training step: one device = every mesh, fused = ordinary, and no memory for what is frozen."""

from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.core import tree
from jaxllm.optim.build import AdaLomo, AdamW, Lion
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.adalora import AdaLora
from jaxllm.peft.freeze import BitFit
from jaxllm.peft.ia3 import Ia3
from jaxllm.peft.lora import Lora
from jaxllm.peft.prefix import PrefixTuning
from jaxllm.peft.prompt import PromptTuning, PTuning
from tests.support.families import mesh_layout
from tests.support.small_runs import Trained, assert_trained_alike, llama, program, ragged_batch, train
from tests.support.tiers import representatives

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10
BIASED = dict(attention_bias=True)
METHODS = {
    "lora": (
        dict(),
        Lora(type="lora", r=4, lora_alpha=8.0, target_modules=("q_proj", "down_proj", "embed_tokens", "lm_head")),
    ),
    "dora": (
        dict(num_key_value_heads=2, **BIASED),
        Lora(
            type="lora",
            r=2,
            use_dora=True,
            use_rslora=True,
            lora_dropout=0.2,
            loraplus_lr_ratio=4.0,
            rank_pattern={"layers.0.*": 3},
            modules_to_save=("lm_head",),
            bias="lora_only",
        ),
    ),
    "pissa": (dict(), Lora(type="lora", r=3, init_lora_weights="pissa", target_modules=("k_proj", "down_proj"))),
    "adalora": (
        dict(),
        AdaLora(type="adalora", init_r=3, target_r=1, tinit=4, tfinal=5, deltaT=3, layers_to_transform=(1,)),
    ),
    "token rows": (
        dict(tie_word_embeddings=True),
        Lora(type="lora", r=2, target_modules=("q_proj",), trainable_token_indices=(100, 3, 60, 9, 31)),
    ),
    "ia3": (BIASED, Ia3(type="ia3", target_modules=r".*(1\..*v|o|up|down)_proj")),
    "prompt_tuning": (dict(tie_word_embeddings=True), PromptTuning(type="prompt_tuning", num_virtual_tokens=3)),
    "p_tuning": (
        dict(),
        PTuning(type="p_tuning", num_virtual_tokens=3, encoder_reparameterization_type="LSTM", encoder_hidden_size=12),
    ),
    "prefix_tuning": (
        dict(num_key_value_heads=2, rope_theta=100.0),
        PrefixTuning(type="prefix_tuning", num_virtual_tokens=3),
    ),
    "prefix_projection": (
        dict(),
        PrefixTuning(type="prefix_tuning", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=12),
    ),
    "bitfit": (BIASED, BitFit(type="bitfit")),
}
OPTIMIZERS = {
    "adamw": AdamW(type="adamw", learning_rate=1e-2, weight_decay=0.1, schedule=Constant(type="constant")),
    "adalomo": AdaLomo(type="adalomo", learning_rate=1e-2, schedule=Constant(type="constant")),
    "lion": Lion(type="lion", learning_rate=1e-3, weight_decay=0.1, schedule=Constant(type="constant")),
}


@cache
def one_device(name: str, optimizer: str) -> Trained:
    """The ordinary step on one device, the whole batch at once."""
    model, method = METHODS[name]
    return train(llama(**model), method=method, optimizer=OPTIMIZERS[optimizer], dtype="float64")


def check(name: str, optimizer: str, sizes: dict[str, int], micro_batches: int, **how: Any) -> None:
    model, method = METHODS[name]
    with jax.enable_x64(True):
        options = dict(optimizer=OPTIMIZERS[optimizer], micro_batches=micro_batches, dtype="float64")
        ours = train(llama(**model), mesh_layout(**sizes), method=method, **options, **how)
        assert_trained_alike(ours, one_device(name, optimizer), TOLERANCE)


FUSED = dict(fused=True)
PAIRS = [
    ("dora", "adamw", dict(data=2, tensor=4), 4, dict(remat="dots")),
    ("dora", "adamw", dict(fsdp=2, tensor=2), 4, FUSED),
    ("adalora", "adamw", dict(pipeline=2, data=2, tensor=2), 4, {}),
    ("token rows", "adamw", dict(fsdp=2, tensor=2), 2, {}),
    pytest.param("token rows", "adamw", dict(pipeline=2, data=2, tensor=2), 4, {}, marks=pytest.mark.full),
    pytest.param("adalora", "lion", dict(data=2, fsdp=2, tensor=2), 2, {}, marks=pytest.mark.full),
    pytest.param("prompt_tuning", "adamw", dict(pipeline=2, data=2, tensor=2), 4, {}, marks=pytest.mark.full),
    pytest.param("prefix_tuning", "adamw", dict(pipeline=2, data=2, tensor=2), 4, {}, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("name", "optimizer", "sizes", "micro_batches", "how"), PAIRS)
def test_one_device_equals_a_mesh(name, optimizer, sizes, micro_batches, how):
    check(name, optimizer, sizes, micro_batches, **how)


# A prefix that is projected is not layer-local, nor is AdaLoRA, which the config says.
TABLE = [
    pytest.param(name, optimizer, how, id=f"{name}-{optimizer}-{'fused' if how else 'ordinary'}")
    for name in METHODS
    for optimizer in (("adamw", "adalomo") if name in ("lora", "dora", "ia3", "bitfit") else ("adamw",))
    for how in ([{}] if name in ("prefix_projection", "adalora") else [{}, FUSED])
]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "optimizer", "how"),
    representatives(
        TABLE,
        [
            *("lora-adamw-ordinary", "lora-adalomo-fused", "dora-adamw-fused", "pissa-adamw-ordinary"),
            *("adalora-adamw-ordinary", "token rows-adamw-fused", "ia3-adamw-fused", "prompt_tuning-adamw-fused"),
            *("p_tuning-adamw-ordinary", "prefix_tuning-adamw-fused", "prefix_projection-adamw-ordinary"),
            "bitfit-adamw-ordinary",
        ],
    ),
)
def test_every_method_on_a_mixed_mesh(name, optimizer, how):
    check(name, optimizer, dict(data=2, fsdp=2, tensor=2), 2, **how)


def test_what_is_frozen_keeps_its_bits_and_has_no_state():
    """Through decay and momentum."""
    model, method = METHODS["dora"]
    made = program(llama(**model), method=method, optimizer=OPTIMIZERS["adamw"])
    state = made.start()
    before = {path: np.asarray(leaf) for path, leaf in tree.flatten(state.frozen).items()}
    trained = tree.flatten(state.params)
    assert {path.rpartition("/")[2] for path in trained} == {"lora_a", "lora_b", "lora_magnitude", "bias", "kernel"}
    assert [path for path in trained if path.endswith("kernel")] == ["head/kernel"]
    moments = {path for path, leaf in tree.flatten(state.opt_state).items() if leaf.ndim}
    assert len(moments) == 2 * len(trained)
    for seed in range(3):
        state, _ = made.compiled.run(state, made.place(ragged_batch(seed)))
    after = tree.flatten(state.frozen)
    assert before.keys() == after.keys()
    assert all(np.array_equal(leaf, after[path]) for path, leaf in before.items())


@pytest.mark.optimized
@pytest.mark.parametrize("how", [{}, FUSED], ids=["ordinary", "fused"])
def test_no_gradient_of_what_is_frozen(how):
    """The temporaries of a step with LoRA are less than the frozen matrices of the layers; those of full training are
    more."""
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, head_dim=32)
    method = Lora(type="lora", r=2)
    options = dict(shape=(1, 8), max_grad_norm=None, **how)
    lora = program(llama(**sizes), method=method, **options)
    frozen = sum(leaf.nbytes for path, leaf in tree.flatten(lora.start().frozen).items() if path.startswith("layers"))
    assert lora.compiled.temp_bytes < frozen / 4
    assert lora.compiled.argument_bytes < 1.2 * frozen
    if not how:
        assert program(llama(**sizes), **options).compiled.temp_bytes > frozen
