"""The host's memory, in which arrays of a device can wait until it needs them."""

from typing import Any

import jax

from jaxllm.core.errors import UserError

# The kinds of memory, as JAX names them.
DEVICE, HOST = "device", "pinned_host"


def check_host_memory(device: Any, what: str, remedy: str) -> None:
    """Raises UserError if `device` cannot reach the host's memory, where `what` says that something is kept."""
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise UserError(
            f"{what} in the host's memory, and {device.device_kind} has no memory {HOST!r} here, only "
            f"{', '.join(kinds)}; {remedy}"
        )


def waits_on_host(array: jax.Array) -> bool:
    """Whether an array is in the host's memory; it may be one that is traced."""
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def to_device(array: jax.Array) -> jax.Array:
    """A traced array in the memory of its device."""
    return jax.device_put(array, jax.memory.Space.Device)


def to_host(array: jax.Array) -> jax.Array:
    """A traced array in the host's memory."""
    return jax.device_put(array, jax.memory.Space.Host)


def copied_on_host(array: jax.Array) -> jax.Array:
    """A copy of a traced array in the host's memory, made by way of the device."""
    return to_host(jax.lax.optimization_barrier(to_device(array)))
