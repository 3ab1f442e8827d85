"""JAX in several processes: started before any device is touched, and ended together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.core.errors import UserError, explained
from jaxllm.processes.launch import Place
from jaxllm.processes.rendezvous import meet
from jaxllm.processes.watch import DistributedConfig, Watch

VERSIONS = ("jaxllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def versions() -> dict[str, str]:
    """What must be the same in all processes of a run: they compile one program."""
    return {name: metadata.version(name) for name in VERSIONS}


@contextmanager
def joined(
    place: Place, facts: Mapping[str, Any], config: DistributedConfig, error: UserError | None = None
) -> Iterator[Watch]:
    """JAX's devices are those of all processes within the block, which none of them leaves alone.

    facts: what must be alike in all processes besides `versions`. error: what is wrong with the input of this process.
    An exception within the block ends all processes: with status 2 and one message if it is a UserError or
    `errors.explained`, otherwise with 1 and a traceback. Raises UserError or Ended as `rendezvous.meet` does.
    """
    meeting = meet(place, {**versions(), **facts}, None if error is None else str(error), config.start_timeout)
    watch = Watch(meeting, config)
    try:
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
        jax.distributed.initialize(
            meeting.coordinator,
            place.num_processes,
            place.process_id,
            local_device_ids=place.gpus,
            coordinator_bind_address=meeting.listens,
            cluster_detection_method="deactivate",
            initialization_timeout=int(config.start_timeout) + 1,
            heartbeat_timeout_seconds=int(2 * config.dead_after) + 30,  # a second net: the watch is first
            shutdown_timeout_seconds=int(config.dead_after) + 1,
        )
        yield watch
        watch.rest()
        jax.distributed.shutdown()
    except UserError as wrong:
        watch.fail(2, str(wrong))
    except Exception as unexpected:
        if (explanation := explained(unexpected)) is not None:
            watch.fail(2, explanation)
        watch.crashed(unexpected)
    watch.close()


def _alone() -> bool:
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all, or the only one. Touches no device."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The texts of all processes in their order; every process must call it."""
    if _alone():
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.zeros(-(-int(sizes.max()) // 1024) * 1024, np.uint8)
    padded[: len(data)] = data
    every = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes().decode() for row, size in zip(every, sizes, strict=True)]


def require_same(what: str, value: object) -> None:
    """Raises UserError in all processes unless `value` has the same text in each. None goes on before all are here."""
    texts = gather(str(value))
    for process, text in enumerate(texts):
        if text != texts[0]:
            raise UserError(
                f"the processes disagree about {what}: it is {texts[0]} in process 0 and {text} in process {process}. "
                "Their files must be the same: use a disk that all hosts share"
            )


class Largest:
    """The largest of the numbers that the processes give, without waiting for any of them.

    Every process must call it equally often. The answer is that of the call before, so that the devices have had the
    time to exchange it: it is the same in every process. A single process gets what it gives.
    """

    def __init__(self) -> None:
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if _alone():
            return number
        largest, sharding = _largest()
        numbers = np.full(len(jax.local_devices()), number, np.int32)
        before, self._before = self._before, largest(jax.make_array_from_process_local_data(sharding, numbers))
        return 0 if before is None else int(before.addressable_data(0))


@functools.cache
def _largest() -> tuple[Callable[[jax.Array], jax.Array], NamedSharding]:
    mesh = Mesh(np.array(jax.devices()), ("device",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(jnp.max, out_shardings=everywhere), NamedSharding(mesh, PartitionSpec("device"))
