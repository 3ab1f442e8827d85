"""Every kind of training step on families whose traits a Llama lacks: each equals the step of one device.

In float64, of each leaf's largest value (DESIGN, section 5).
"""

from functools import cache
from typing import Any

import jax
import pytest

from jaxllm.models import FAMILIES
from jaxllm.optim.build import AdamW
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.lora import Lora
from jaxllm.step.sampled_layers import Draws
from tests.support.families import mesh_layout
from tests.support.small_runs import VOCAB, Trained, assert_trained_alike, train

TOLERANCE = 1e-10
SIZES = dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64)
# A window shorter than the documents.
TRAITS: dict[str, dict[str, Any]] = {
    "gemma2": dict(sliding_window=3, attn_logit_softcapping=2.0, final_logit_softcapping=4.0, query_pre_attn_scalar=9),
    "mistral": dict(sliding_window=3),
    "qwen3": dict(tie_word_embeddings=True, attention_bias=True),
}
# A large eps: the first update of a fresh AdamW is the sign of the gradient, whatever its last bits are.
OPTIMIZER = AdamW(type="adamw", learning_rate=3e-3, eps=1e-3, schedule=Constant(type="constant", warmup=0))
METHODS: dict[str, dict[str, Any]] = {
    "everything": dict(),
    "lisa": dict(lisa=Draws(1, 2, 0)),
    "lora": dict(method=Lora(type="lora", r=2, target_modules=("q_proj", "down_proj"))),
}
MESH, STAGES = dict(data=2, fsdp=2, tensor=2), dict(pipeline=2, tensor=2)
STEPS = {
    "everything, fused, mesh": ("everything", MESH, dict(fused=True)),
    "everything, pipeline": ("everything", STAGES, dict(micro_batches=2)),
    "lisa, fused, mesh": ("lisa", MESH, dict(fused=True)),
    "lora, pipeline": ("lora", STAGES, dict(micro_batches=2)),
}


def trained(family: str, method: str, mesh: dict[str, int], **how: Any) -> Trained:
    config = FAMILIES[family].config(**SIZES, **TRAITS[family])
    how = dict(optimizer=OPTIMIZER, dtype="float64", steps=3, **METHODS[method], **how)
    with jax.enable_x64(True):
        return train(config, mesh_layout(**mesh) if mesh else None, **how)


@cache
def on_one_device(family: str, method: str) -> Trained:
    return trained(family, method, {})


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", ["gemma2", *(pytest.param(name, marks=pytest.mark.full) for name in [*TRAITS][1:])])
def test_every_step_is_that_of_one_device(family, step):
    method, mesh, how = STEPS[step]
    assert_trained_alike(trained(family, method, mesh, **how), on_one_device(family, method), TOLERANCE)
