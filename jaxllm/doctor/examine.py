"""What the processes of a run see: gathered, printed by process 0, and judged."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from jaxllm.core.compilation_cache import cache_root
from jaxllm.core.errors import UserError
from jaxllm.core.hardware import GIB
from jaxllm.core.mesh import Layout
from jaxllm.processes.distributed import gather, versions
from jaxllm.processes.launch import Place
from jaxllm.runs.config import Config

# What a device adds up: enough to see the network rather than the wait for one another.
ARRAY_BYTES = 2**25
REPEATS = 5
CUDA_PACKAGES = re.compile(r"jax-cuda\d+-plugin|nvidia-(cuda-runtime|cudnn|nccl|cublas)(-cu\d+)?")


class Sight(NamedTuple):
    """What one process sees. gpus: those of NVIDIA in its host, whoever uses them. free_gib: of disks, by their use."""

    process: int
    pid: int
    host: str
    platform: str
    kind: str
    devices: int
    device_gib: float | None
    gpus: int
    driver: str | None
    host_gib: float
    free_gib: dict[str, float | None]


def examine(config: Config | None, place: Place | None, console: Console) -> None:
    """Prints what all processes see, lays the mesh of the config over their devices, and runs a collective.

    Raises UserError, in all processes, for a set-up that cannot run, or would not use what is there.
    """
    sights = [Sight(**json.loads(text)) for text in gather(json.dumps(_sight(config)._asdict()))]
    found = {**versions(), **_cuda_versions()}
    console.print("versions  " + ", ".join(f"{name} {version}" for name, version in found.items()), soft_wrap=True)
    if place is None:
        console.print("processes 1, a run of its own")
    else:
        console.print(
            f"processes {place.num_processes}, as {place.launcher} says; the coordinator is {place.coordinator}",
            soft_wrap=True,
        )
    console.print(_table(sights))
    for problem in _problems(sights):
        raise UserError(problem)
    if config is not None:
        layout = Layout.of(config.mesh)
        micro_batches, rows = config.train.accumulation(layout)
        here = layout.local("batch", rows)
        read = gather(f"{here.start} to {here.stop - 1}")
        console.print(f"mesh      {layout}", soft_wrap=True)
        console.print(f"rows      {micro_batches} × {rows} a step, of which process 0 reads {read[0]} of each {rows}")
    total, seconds = add_up()
    if total != jax.device_count():
        raise UserError(f"{jax.device_count()} devices have added up their ones to {total}; their network is broken")
    rate = 2 * ARRAY_BYTES * (1 - 1 / jax.device_count()) / seconds / 1e9
    speed = f", {rate:.3g} GB/s a device" if jax.device_count() > 1 else ""
    console.print(
        f"together  {jax.device_count()} devices added up {ARRAY_BYTES / 2**20:.0f} MiB each in {seconds * 1e3:.3g} ms"
        f"{speed}: right",
        soft_wrap=True,
    )


def add_up() -> tuple[float, float]:
    """The sum of a one from each device, and the seconds of an all-reduce of ARRAY_BYTES a device, the fastest of
    a few."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    parts, whole = NamedSharding(mesh, PartitionSpec("device")), NamedSharding(mesh, PartitionSpec())
    ones = jax.jit(lambda: jnp.ones((jax.device_count(), ARRAY_BYTES // 4), jnp.float32), out_shardings=parts)()
    add = jax.jit(lambda x: jnp.sum(x, axis=0), out_shardings=whole)
    result, fastest = add(ones).block_until_ready(), float("inf")
    for _ in range(REPEATS):
        begun = time.perf_counter()
        result = add(ones).block_until_ready()
        fastest = min(fastest, time.perf_counter() - begun)
    values = np.asarray(result.addressable_data(0))
    return (float(values[0]) if values.min() == values.max() else float("nan")), fastest


def _sight(config: Config | None) -> Sight:
    try:
        device = jax.local_devices()[0]
    except RuntimeError as error:  # of the driver, or of CUDA's libraries
        raise UserError(f"JAX cannot use the devices of {socket.gethostname()}: {error}") from error
    limit = (device.memory_stats() or {}).get("bytes_limit")
    folders = {"cache": cache_root(), **({"output_dir": Path(config.output_dir)} if config is not None else {})}
    return Sight(
        process=jax.process_index(),
        pid=os.getpid(),
        host=socket.gethostname(),
        platform=device.platform,
        kind=device.device_kind,
        devices=jax.local_device_count(),
        device_gib=None if limit is None else limit / GIB,
        gpus=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        driver=_driver(),
        host_gib=psutil.virtual_memory().available / GIB,
        free_gib={use: _free(folder) for use, folder in folders.items()},
    )


def _driver() -> str | None:
    """The version of NVIDIA's driver, if there is one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d+\.\d+(\.\d+)?)\b", text)
    return found[1] if found else None


def _cuda_versions() -> dict[str, str]:
    names = ((dist.metadata["Name"] or "", dist.version) for dist in metadata.distributions())
    return dict(sorted((name, version) for name, version in names if CUDA_PACKAGES.fullmatch(name)))


def _free(folder: Path) -> float | None:
    """Free GiB where `folder` is or would be made; None if this process may not write there."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free / GIB if there.is_dir() and os.access(there, os.W_OK) else None


def _table(sights: Sequence[Sight]) -> Table:
    uses = list(sights[0].free_gib)
    table = Table(
        "process", "host", "pid", "devices", "driver", "memory", *uses, title="memory and disks: what is free"
    )
    for sight in sights:
        each = "" if sight.device_gib is None else f", {sight.device_gib:.1f} GiB each"
        table.add_row(
            str(sight.process),
            sight.host,
            str(sight.pid),
            f"{sight.devices} × {sight.kind}{each}",
            sight.driver or "none",
            f"{sight.host_gib:.1f} GiB",
            *("not writable" if (free := sight.free_gib[use]) is None else f"{free:.1f} GiB" for use in uses),
        )
    return table


def _problems(sights: Sequence[Sight]) -> Iterator[str]:
    """What is wrong with what the processes see, the worst first."""
    for sight in sights:
        who = f"process {sight.process} on {sight.host}"
        if sight.gpus and sight.platform != "gpu":
            yield (
                f"{who} has {sight.gpus} NVIDIA GPUs (driver {sight.driver}) and JAX sees none of them: install "
                "jaxllm[cuda12] or [cuda13], and look at JAX_PLATFORMS and CUDA_VISIBLE_DEVICES"
            )
        first = sights[0]
        if (sight.kind, sight.devices) != (first.kind, first.devices):
            yield (
                f"{who} has {sight.devices} × {sight.kind}, and process 0 on {first.host} {first.devices} × "
                f"{first.kind}; give each process as many devices of the same kind"
            )
        for use, free in sight.free_gib.items():
            if free is None:
                remedy = "set JAXLLM_CACHE to another folder" if use == "cache" else "choose another output_dir"
                yield f"{who} cannot write to the folder of the {use}; {remedy}"
    used = Counter[str]()
    for sight in sights:
        used[sight.host] += sight.devices
    for sight in sights:
        if sight.platform == "gpu" and used[sight.host] < sight.gpus:
            yield (
                f"the processes on {sight.host} use {used[sight.host]} of its {sight.gpus} GPUs; give them all, by one "
                "process a host or one a GPU, or hide the others with CUDA_VISIBLE_DEVICES"
            )
