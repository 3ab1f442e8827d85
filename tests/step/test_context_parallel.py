"""Context parallelism: the length of sequences is split over an axis, whose devices gather keys and values."""

import re
from functools import cache
from typing import Any

import jax
import pytest

from jaxllm.core.errors import UserError
from jaxllm.nn import chunks
from jaxllm.optim.build import AdaLomo, AdamW, SophiaG
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.lora import Lora
from jaxllm.step.compile import CompiledStep
from jaxllm.step.selection import Draws
from tests.support.families import mesh_layout
from tests.support.small_runs import assert_trained_alike, llama, program, train

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10
ADALOMO = AdaLomo(type="adalomo", learning_rate=1e-2, schedule=Constant(type="constant"))
SOPHIA = SophiaG(type="sophia_g", learning_rate=2e-3, hessian_every=2, schedule=Constant(type="constant", warmup=0))
# Of a fresh AdamW with a small eps the first update has the last bits of the smallest gradients grow (test_lisa).
FRESH = AdamW(type="adamw", learning_rate=3e-3, eps=1e-3, schedule=Constant(type="constant", warmup=0))
DORA = Lora(type="lora", r=2, target_modules="all-linear", use_dora=True)
GROUPED = dict(num_key_value_heads=2)
DYNAMIC = dict(rope=dict(type="dynamic", factor=4.0), max_position_embeddings=4)


def check(model: dict, sizes: dict[str, int], rules: dict | None = None, **how) -> None:
    """Of rows of 12 tokens, in which documents begin and end anywhere."""
    with jax.enable_x64(True):
        layout = mesh_layout(**sizes).replace(**(rules or {}))
        ours, one_device = (train(llama(**model), where, dtype="float64", **how) for where in (layout, None))
        assert_trained_alike(ours, one_device, TOLERANCE)


def test_it_is_the_same_as_one_device():
    """Fewer key-value heads than devices of the tensor axis; accumulating."""
    check(GROUPED, dict(context=2, tensor=4), micro_batches=4)


def test_in_a_pipeline():
    check(GROUPED, dict(pipeline=2, context=4), micro_batches=4)


BOTH = dict(act_length=("context", "tensor"))
CASES = {
    "fused": (GROUPED, dict(context=4, tensor=2), {}, dict(fused=True, optimizer=ADALOMO, micro_batches=2)),
    "dropout and sequence parallelism": ({}, dict(context=2, fsdp=2, tensor=2), BOTH, dict(dropout=0.2)),
    "an adapter, computed again": (GROUPED, dict(data=2, fsdp=2, context=2), {}, dict(method=DORA, remat="full")),
    "a tied head, products kept": (
        dict(tie_word_embeddings=True),
        dict(fsdp=2, context=4),
        {},
        dict(remat="dots", micro_batches=4),
    ),
    "angles by the length of documents": (DYNAMIC, dict(context=4, tensor=2), {}, {}),
    "some layers": ({}, dict(context=2, data=2), {}, dict(lisa=Draws(1, 5, 0), optimizer=FRESH)),
    "drawn targets": (GROUPED, dict(context=2, tensor=2), {}, dict(optimizer=SOPHIA, curvature=Curvature(2, 0.04))),
    "every axis": (GROUPED, dict(pipeline=2, context=2, tensor=2), BOTH, dict(micro_batches=4, remat="full")),
}


@pytest.mark.full
@pytest.mark.parametrize("case", CASES)
def test_with(case):
    model, sizes, rules, how = CASES[case]
    check(model, sizes, rules, **how)


@pytest.mark.full
def test_loss_and_embedding_in_chunks(monkeypatch):
    """Each chunk has a token of each of two devices."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1)
    check({}, dict(context=2, tensor=2))


# Of one row of so many tokens, in a model with so wide a residual stream and feed-forward layer.
LENGTH, WIDTHS = 1024, {192, 48}


@cache
def long_program(length: int, parts: int) -> CompiledStep:
    config = llama(hidden_size=192, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", 4 * 101 * 32)
        return program(config, mesh_layout(context=parts), shape=(1, length), remat="full").compiled


@pytest.mark.optimized
def test_a_device_holds_its_part_alone():
    """A length that is split over four devices takes about as much on each as a fourth of it takes on one; and no array
    of the program has the width of the model at all places."""
    short, long, split = long_program(LENGTH // 4, 1), long_program(LENGTH, 1), long_program(LENGTH, 4)
    assert long.temp_bytes > 3 * short.temp_bytes
    assert split.temp_bytes < 1.5 * short.temp_bytes

    def whole(compiled: Any) -> set[str]:
        shapes = set(re.findall(r"\bf32\[([\d,]+)\]", compiled.as_text()))
        return {shape for shape in shapes if (sizes := set(map(int, shape.split(",")))) & WIDTHS and LENGTH in sizes}

    assert whole(long.run)
    assert not whole(split.run)


@pytest.mark.optimized
def test_what_is_gathered_of_a_layer_are_keys_and_values():
    """Forward and again backward; the gradients of both are handed back in parts. Weights are gathered as over fsdp."""
    compiled: Any = long_program(LENGTH, 4).run

    def of_attention(operation: str) -> list[str]:
        """The results of one device."""
        return sorted(re.findall(rf"= (\w+\[[\d,]*\])\S* {operation}\(.*attn/shard_map", compiled.as_text()))

    assert of_attention("all-gather") == 4 * [f"f32[1,{LENGTH},1,4]"] + 2 * [f"s32[1,{LENGTH}]"]
    assert of_attention("reduce-scatter") == 2 * [f"f32[1,{LENGTH // 4},1,4]"]
    assert not of_attention("collective-permute")
    assert not of_attention("all-to-all")


def test_a_length_that_does_not_divide_is_refused():
    layout = mesh_layout(context=4, tensor=2).replace(**BOTH)
    with pytest.raises(UserError) as error:
        program(llama(), layout, shape=(8, 12))
    assert str(error.value) == (
        "rows of 12 tokens do not divide over the 8 devices of the mesh (context 4 × tensor 2) that share a sequence; "
        "set data.seq_len so that they do: to 8 or 16, or with data.packing grouped to a multiple of 64"
    )
