"""Whether a compiled step fits into its devices, said before anything is allocated, and what would help."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import jax
import psutil
from pydantic import ValidationError

from jaxllm.core.errors import UserError
from jaxllm.core.hardware import GIB
from jaxllm.runs.config import Config
from jaxllm.step.compile import CompiledStep

# A remedy is named if it saves this share of the peak; and how many are named at most.
SAVES, SHOWN = 0.02, 4
OPTIM = "optim"


def device_bytes(device: Any) -> int:
    """The bytes that a program may use on `device`; simulated CPU devices share what the machine has free."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return psutil.virtual_memory().available // len(jax.local_devices())


Compile = Callable[[Config], int]
"""The peak bytes of a device in the compiled step of a config. Raises UserError for one that a run would refuse."""


@dataclass(frozen=True)
class Remedy:
    """Settings that may lower the peak.

    changes: by their dotted keys. undoes: whether the config itself asks for what they take back. peak: the bytes that
    they lead to; None = not compiled.
    """

    changes: Mapping[str, Any]
    undoes: bool = False
    peak: int | None = None

    def applied(self, config: Config) -> Config | None:
        """`config` with the changes, or None if it refuses them."""
        values = config.model_dump(mode="json")
        for key, value in self.changes.items():
            *sections, name = key.split(".")
            reduce(lambda section, part: section[part], sections, values)[name] = value
        try:
            return Config.model_validate_json(json.dumps(values))
        except ValidationError:
            return None

    def __str__(self) -> str:
        said = {key: json.dumps(value).strip('"') for key, value in self.changes.items()}
        if OPTIM in self.changes:
            said = {f"{OPTIM}.type": self.changes[OPTIM]["type"]}
        text = ", ".join(f"{key}: {value}" for key, value in said.items())
        return text if self.peak is None else f"{text} ({self.peak / GIB:.2f} GiB)"


def check_fits(compiled: CompiledStep, limit: int, advice: Callable[[], str]) -> None:
    """Raises UserError with `advice` if a device needs more than `limit` bytes for the compiled step."""
    if compiled.peak_bytes > limit:
        raise UserError(out_of_memory(compiled, limit, advice()))


def out_of_memory(compiled: CompiledStep, limit: int, advice: str) -> str:
    """What was asked of each device, what there is, and what would help."""
    return (
        f"out of memory: a training step needs {compiled.peak_bytes / GIB:.2f} GiB on each device "
        f"({compiled.argument_bytes / GIB:.2f} parameters, optimizer state and batch, "
        f"{compiled.temp_bytes / GIB:.2f} activations and gradients), and {limit / GIB:.2f} GiB are there. {advice}"
    )


@contextmanager
def memory_errors(message: Callable[[], str]) -> Iterator[None]:
    """Raises UserError with `message` in place of JAX's error when a device is full."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(message()) from error


def untried_advice(config: Config, micro_batch_size: int) -> str:
    """The first of `remedies` as text, for a run, which does not wait for each to be compiled."""
    found = "; ".join(map(str, remedies(config, micro_batch_size)[:SHOWN]))
    return (
        f"What may help: {found}; more devices on mesh.fsdp or mesh.tensor. python -m jaxllm.plan with the same "
        "arguments compiles each and says by how much"
    )


def tried(
    candidates: Sequence[Remedy],
    config: Config,
    peak: int,
    compile_peak: Compile,
    seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Remedy], Sequence[Remedy]]:
    """The remedies that lower `peak` by at least SAVES, with the bytes that they lead to, and those not compiled.

    What the config itself asks for comes first, then the best. Each is compiled in the order given; after `seconds` no
    other one is begun.
    """
    start, found, left = time.monotonic(), [], candidates[:0]
    for i, remedy in enumerate(candidates):
        if time.monotonic() - start > seconds:
            left = candidates[i:]
            break
        progress(f"trying {remedy} ({i + 1} of {len(candidates)})")
        if (changed := remedy.applied(config)) is None:
            continue
        try:
            lower = compile_peak(changed)
        except (UserError, jax.errors.JaxRuntimeError):
            continue  # a run with it would break off
        if lower <= (1 - SAVES) * peak:
            found.append(replace(remedy, peak=lower))
    return sorted(found, key=lambda remedy: (not remedy.undoes, remedy.peak))[:SHOWN], left


def remedies(config: Config, micro_batch_size: int, mesh: Mapping[str, int] | None = None) -> list[Remedy]:
    """The settings that may lower the peak and that `config` takes, what it asks for itself first.

    micro_batch_size: of a device. mesh: the sizes of its axes, where there may be more devices.
    """
    train, optim = config.train, config.optim
    asked = {
        "train.virtual_stages": (train.virtual_stages > 1, 1),
        "train.attention": (train.attention == "xla", "auto"),
        "train.unroll": (train.unroll != "auto", "auto"),
        "train.xla": (bool(train.xla), {}),
        "mesh.rules": (bool(config.mesh.rules), {}),
    }
    found = [Remedy({key: default}, undoes=True) for key, (differs, default) in asked.items() if differs]
    if train.update == "ordinary":
        if train.remat != "full":
            found.append(Remedy({"train.remat": "full"}))
        recomputed = {} if train.remat == "none" else {"train.remat": "none"}
        found.append(Remedy({"train.update": "fused", **recomputed}))
    if micro_batch_size > 1:
        found.append(Remedy({"train.micro_batch_size": 1}))
    found += [Remedy({f"mesh.{axis}": 2 * mesh[axis]}) for axis in ("fsdp", "tensor") if mesh is not None]
    if train.param_dtype == "float32" and train.compute_dtype != "float16":
        found.append(Remedy({"train.param_dtype": "bfloat16"}))
    if config.mesh.data > 1 and not train.shard_optimizer:
        found.append(Remedy({"train.shard_optimizer": True}))
    if optim.type not in ("lion", "adalomo", "lomo", "sgd"):
        kept = {"learning_rate", "schedule", "weight_decay", "no_decay"}
        of_any = optim.model_dump(mode="json", include=kept)
        found += [Remedy({OPTIM: {"type": name, **of_any}}) for name in ("lion", "adalomo")]
    found.append(Remedy({"data.seq_len": config.data.seq_len // 2}))
    return [remedy for remedy in found if remedy.applied(config) is not None]
