"""What a run counts: operations a token, and whether a step fits."""

import pytest

from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.models import FAMILIES, LM
from jaxllm.train.config import Config
from jaxllm.train.memory import check_fits
from jaxllm.train.metrics import flops_per_token, peak_flops
from jaxllm.train.step import CompiledStep

GIB = 2**30


def test_flops_of_a_model_counted_by_hand() -> None:
    llama = FAMILIES["llama"]
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    lm = LM(llama, llama.config(vocab_size=10, num_key_value_heads=1, **sizes), Layout.single())
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    parameters = 10 * 8 + 3 * (attention + 3 * 8 * 16 + 2 * 8) + 8 + 8 * 10
    assert lm.parameter_count() == parameters
    quadratic = 12 * 3 * 2 * 4 * 32  # layers, heads, width of a head, length
    assert flops_per_token(lm, 32) == (6 * parameters + quadratic, 6 * parameters + quadratic / 2)
    assert peak_flops(Layout.single()) is None  # a CPU has no figure to be compared with


def config(**train: object) -> Config:
    return Config.model_validate(
        {
            "output_dir": "run",
            "model": {"path": "model"},
            "data": {"sources": [{"path": "text"}], "seq_len": 1024},
            "optim": {"type": "adamw", "learning_rate": 1e-3},
            "train": {"steps": 1, "batch_size": 8, **train},
        }
    )


@pytest.mark.parametrize(
    ("arguments", "temporary", "train", "first", "three"),
    [
        (2, 30, {}, "train.remat: full", ["train.micro_batch_size: 4 (now 8)", "mesh.fsdp"]),
        (2, 30, {"remat": "full"}, "train.micro_batch_size: 4", ["data.seq_len: 512 (now 1024)", "mesh.fsdp"]),
        (30, 2, {}, "mesh.fsdp", ["optim.type: lion", "train.remat: full"]),
    ],
)
def test_what_does_not_fit_is_refused_with_three_remedies(arguments, temporary, train, first, three) -> None:
    peak = arguments + temporary
    step = CompiledStep(lambda state, batch: (state, {}), 1.0, arguments * GIB, temporary * GIB, peak * GIB)
    check_fits(step, config(**train), 8, peak * GIB)
    with pytest.raises(UserError) as caught:
        check_fits(step, config(**train), 8, 16 * GIB)
    message = str(caught.value)
    assert "32.00 GiB" in message
    assert "16.00 GiB are there" in message
    remedies = message.partition("What would help most: ")[2].split("; ")
    assert len(remedies) == 3
    assert first in remedies[0]
    assert all(any(remedy in found for found in remedies[1:]) for remedy in three)
