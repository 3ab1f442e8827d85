"""Whether a step fits, and what a user is told when it does not."""

from typing import Any

import jax
import psutil
import pytest

from jaxllm.core.errors import UserError
from jaxllm.train.config import Config
from jaxllm.train.memory import GIB, check_fits, device_bytes
from jaxllm.train.step import CompiledStep


def config(**train: Any) -> Config:
    return Config.model_validate(
        {
            "output_dir": "run",
            "model": {"path": "model"},
            "data": {"sources": [{"path": "text.jsonl"}], "seq_len": 4096},
            "optim": {"type": "adamw", "learning_rate": 1e-4},
            "train": {"steps": 10, "batch_size": 32, "micro_batch_size": 8, **train},
        }
    )


def compiled(state_gib: float, activations_gib: float) -> CompiledStep:
    def nothing(*_: Any) -> Any: ...

    state, activations = int(state_gib * GIB), int(activations_gib * GIB)
    sizes = dict(argument_bytes=state, temp_bytes=activations, peak_bytes=state + activations)
    return CompiledStep(nothing, 1.0, **sizes, in_place_bytes=state, host_bytes=0)


def message(step: CompiledStep, limit_gib: float, micro_batch: int = 8, **train: Any) -> str:
    with pytest.raises(UserError) as error:
        check_fits(step, config(**train), micro_batch, int(limit_gib * GIB))
    return str(error.value)


def test_what_fits_is_let_through():
    check_fits(compiled(10, 6), config(), 8, 16 * GIB)


def test_what_was_asked_and_what_is_there():
    text = message(compiled(30.5, 61.25), 80)
    assert "\n" not in text
    for part in ("91.75 GiB", "30.50 parameters", "61.25 activations", "80.00 GiB are there"):
        assert part in text


def settings(text: str) -> list[str]:
    return text.split("What would help most: ")[1].split("; ")


def test_activations_are_saved_first_where_they_are_most():
    remat, micro_batch, mesh = settings(message(compiled(20, 70), 80))
    assert remat == "train.remat: full"
    assert micro_batch == "train.micro_batch_size: 4 (now 8)"
    assert "mesh.fsdp" in mesh


def test_state_is_saved_first_where_it_is_most():
    mesh, optimizer, remat = settings(message(compiled(70, 20), 80))
    assert "mesh.fsdp" in mesh
    assert optimizer.startswith("optim.type: lion")
    assert remat == "train.remat: full"


def test_what_is_already_set_is_not_advised():
    text = message(compiled(20, 70), 80, micro_batch=1, remat="full", micro_batch_size=1)
    length, *_ = settings(text)
    assert length == "data.seq_len: 2048 (now 4096)"
    assert len(settings(text)) == 3
    assert "remat" not in text
    assert "micro_batch" not in text


def test_simulated_devices_share_the_machine():
    share = device_bytes(jax.local_devices()[0])
    assert 0 < share * len(jax.local_devices()) <= psutil.virtual_memory().total
