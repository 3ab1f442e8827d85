"""Whether a step fits, and what a user is told when it does not."""

from typing import Any

import jax
import psutil
import pytest

from jaxllm.core.errors import UserError
from jaxllm.core.hardware import GIB
from jaxllm.runs.config import Config
from jaxllm.step.compile import CompiledStep
from jaxllm.train.memory import check_fits, device_bytes, remedies, tried, untried_advice


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


def test_what_fits_is_let_through():
    check_fits(compiled(10, 6), 16 * GIB, lambda: pytest.fail("there is nothing to advise"))


def test_what_was_asked_and_what_is_there():
    with pytest.raises(UserError) as error:
        check_fits(compiled(30.5, 61.25), 80 * GIB, lambda: "What would help most: prayer")
    text = str(error.value)
    assert "\n" not in text
    for part in ("91.75 GiB", "30.50 parameters", "61.25 activations", "80.00 GiB are there. What would help"):
        assert part in text


def changes(chosen: Config) -> list[str]:
    return [str(remedy) for remedy in remedies(chosen, 8)]


def test_what_is_refused_or_set_already_is_no_remedy():
    assert "train.update: fused" in changes(config())
    unrolled = changes(config(unroll="all", remat="full"))
    assert unrolled[0] == "train.unroll: auto"
    assert not [remedy for remedy in unrolled if remedy.startswith("train.remat")]
    assert "train.update: fused, train.remat: none" in changes(config(remat="full"))
    sophia = config().model_dump(mode="json") | {"optim": {"type": "sophia_g", "learning_rate": 1e-4}}
    assert not [remedy for remedy in changes(Config.model_validate(sophia)) if "fused" in remedy]
    assert "optim.type: lion" in changes(config())
    assert "train.micro_batch_size: 1" not in [str(remedy) for remedy in remedies(config(), 1)]


def test_a_remedy_is_compiled_and_the_best_comes_first():
    """But what the config itself asks for is named before all others, and what saves next to nothing is not named."""
    sizes = {"remat": 40, "update": 98, "micro_batch_size": 60, "param_dtype": 70, "seq_len": 99}
    seen = []

    def compile_peak(changed: Config) -> int:
        train, before = changed.train, config(unroll="all").train
        if changed.optim.type != "adamw":
            raise UserError("a run would refuse it")
        differing = [name for name in ("unroll", *sizes) if getattr(train, name, None) != getattr(before, name, None)]
        seen.append(name := next(iter(differing), "seq_len"))
        return sizes.get(name, 80) * GIB

    unrolled = config(unroll="all")
    found, left = tried(remedies(unrolled, 8), unrolled, 100 * GIB, compile_peak, seconds=60)
    assert not left
    assert [str(remedy) for remedy in found] == [
        "train.unroll: auto (80.00 GiB)",
        "train.remat: full (40.00 GiB)",
        "train.micro_batch_size: 1 (60.00 GiB)",
        "train.param_dtype: bfloat16 (70.00 GiB)",
    ]
    assert seen == ["unroll", "remat", "update", "micro_batch_size", "param_dtype", "seq_len"]
    assert tried(remedies(unrolled, 8), unrolled, 100 * GIB, compile_peak, seconds=-1) == ([], remedies(unrolled, 8))


def test_without_time_to_compile_the_causes_come_first():
    text = untried_advice(config(unroll="all"), 8)
    assert text.startswith("What may help: train.unroll: auto; train.remat: full; ")
    assert "GiB" not in text


def test_simulated_devices_share_the_machine():
    share = device_bytes(jax.local_devices()[0])
    assert 0 < share * len(jax.local_devices()) <= psutil.virtual_memory().total
