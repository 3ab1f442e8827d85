"""Adapters beside matrices in 4 or 8 bits: what the step computes is what it would of the matrices read back."""

import re
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm.core import tree
from jaxllm.models.quantized import Quantization
from jaxllm.nn.quantized import STORED
from jaxllm.peft.adalora import AdaLora
from jaxllm.peft.ia3 import Ia3
from jaxllm.peft.lora import Lora
from tests.support.families import mesh_layout
from tests.support.small_runs import Trained, assert_trained_alike, llama, program, ragged_batch, train

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10
# One block of 64 in most rows, which no mesh divides, and four in those of the feed-forward layer's second matrix.
SIZES = dict(hidden_size=64, intermediate_size=256, head_dim=8)
NF4, INT8 = Quantization("nf4", double=True), Quantization("int8", double=False)
BASES = {"nf4": NF4, "nf4 single": Quantization("nf4", double=False), "int8": INT8}
METHODS = {
    "dora": Lora(type="lora", r=2, use_dora=True, use_rslora=True, lora_dropout=0.2, modules_to_save=("lm_head",)),
    "lora": Lora(type="lora", r=4, lora_alpha=8.0, target_modules=("q_proj", "down_proj")),
    "ia3": Ia3(type="ia3"),
    "adalora": AdaLora(type="adalora", init_r=3, target_r=1, tinit=6, tfinal=11, deltaT=2, orth_reg_weight=0.01),
}


@cache
def as_floats(base: str, method: str, steps: int) -> Trained:
    """On one device, from the matrices read back."""
    how = dict(quantization=BASES[base], as_floats=True, dtype="float64", steps=steps)
    return train(llama(**SIZES), method=METHODS[method], **how)


FUSED = dict(fused=True)
CASES = [
    ("nf4", "dora", dict(fsdp=2, tensor=2), dict(micro_batches=4, remat="dots")),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in (
            ("int8", "lora", dict(data=2, fsdp=2), FUSED),
            ("nf4", "dora", dict(pipeline=2, data=2, tensor=2), dict(micro_batches=4)),
            ("nf4", "dora", dict(data=2, fsdp=2, tensor=2), FUSED),
            ("nf4 single", "lora", dict(fsdp=4, tensor=2), {}),
            ("nf4", "ia3", dict(fsdp=8), {}),
            ("nf4", "adalora", dict(fsdp=2, tensor=2), {}),
            ("int8", "dora", dict(pipeline=2, fsdp=2, tensor=2), dict(micro_batches=2, remat="full")),
        )
    ),
]


@pytest.mark.parametrize(("base", "method", "sizes", "how"), CASES)
def test_a_mesh_equals_floats_on_one_device(base, method, sizes, how):
    with jax.enable_x64(True):
        options = dict(quantization=BASES[base], method=METHODS[method], dtype="float64", steps=8, **how)
        ours = train(llama(**SIZES), mesh_layout(**sizes), **options)
        theirs = as_floats(base, method, 8)
        assert_trained_alike(ours, theirs, TOLERANCE)
        assert theirs.metrics["loss"][-4:].mean() < theirs.metrics["loss"][:4].mean()


def large(**how: Any) -> Any:
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, head_dim=32)
    method = Lora(type="lora", r=2, target_modules=("v_proj",))
    return program(llama(**sizes), method=method, shape=(4, 8), max_grad_norm=None, **how)


@pytest.mark.optimized
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="ordinary"),
        pytest.param(dict(remat="dots"), id="dots", marks=pytest.mark.full),
        pytest.param(FUSED, id="fused", marks=pytest.mark.full),
    ],
)
def test_what_is_read_back_is_not_kept(how):
    """The step has no room for half of the matrices in what it computes in, activations included."""
    made = large(quantization=NF4, **how)
    frozen = {path: leaf for path, leaf in tree.flatten(made.start().frozen).items() if path.startswith("layers/")}
    matrices = sum(leaf.nbytes for path, leaf in frozen.items() if path.rpartition("/")[2] in STORED)
    of_layer = 4 * (4 * 256 * 256 + 3 * 256 * 1024)
    assert matrices == pytest.approx(8 * of_layer / 4 * (1 / 2 + 1 / 64), rel=0.01)
    assert made.compiled.argument_bytes < 1.5 * matrices
    assert made.compiled.temp_bytes < 4 * of_layer


@pytest.mark.optimized
def test_what_devices_send_one_another_is_the_codes():
    text = large(quantization=NF4, layout=mesh_layout(fsdp=4)).compiled.run.as_text()
    sent = re.findall(r"= \(?(\w+)\[([\d,]*)\]\S* all-gather", text)
    of_matrices = [(kind, shape) for kind, shape in sent if np.prod([int(n) for n in shape.split(",")]) > 20_000]
    assert len(of_matrices) >= 7
    assert {kind for kind, _ in of_matrices} == {"u8"}


def test_what_is_stored_keeps_its_bits():
    made = program(llama(**SIZES), method=METHODS["lora"], quantization=NF4)
    state = made.start()
    before = {path: np.asarray(leaf) for path, leaf in tree.flatten(state.frozen).items()}
    state, _ = made.compiled.run(state, made.place(ragged_batch(0)))
    for path, leaf in tree.flatten(state.frozen).items():
        np.testing.assert_array_equal(leaf, before[path], err_msg=path)
    assert not any(path.rpartition("/")[2] in STORED for path in tree.flatten((state.params, state.opt_state)))
