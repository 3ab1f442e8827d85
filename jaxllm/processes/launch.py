"""Which process of how many this one is, from what started it: environment variables alone, no device is touched.

Either the launcher says it (Slurm's srun, Open MPI's mpirun, an indexed Job of Kubernetes), or three variables do:
JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID; each of them goes before what
the launcher says, and JAX_NUM_PROCESSES=1 makes any process a run of its own. JAX_COORDINATOR_PORT changes the port
alone, JAX_LOCAL_DEVICE_IDS says which GPUs of its host a process has. JAXLLM_RUN_TOKEN, the same text in all processes
of a run, keeps processes of other runs and other programs out; without it, the launcher's number of the job does.
"""

import hashlib
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxllm.core.errors import UserError

COORDINATOR, COUNT, ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
TOKEN = "JAXLLM_RUN_TOKEN"


class Launcher(NamedTuple):
    """What a launcher tells each process; `needs`: variables without which it is none.

    num_processes: the first of these variables that is set. per_host: how many processes are on this host; hosts: how
    many hosts there are. job: variables that are the same in all processes of a run, and in no other run.
    """

    name: str
    needs: tuple[str, ...]
    process_id: str
    num_processes: tuple[str, ...]
    local_id: str
    per_host: str = ""
    hosts: str = ""
    job: tuple[str, ...] = ()


# In a batch script of Slurm, before srun, SLURM_NTASKS is set and the step's list of nodes is not. In the shell of an
# interactive step SLURM_NTASKS is the job's number of tasks, and the step has one.
SLURM = Launcher(
    "Slurm",
    ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"),
    "SLURM_PROCID",
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    "SLURM_LOCALID",
    per_host="SLURM_STEP_TASKS_PER_NODE",
    hosts="SLURM_STEP_NUM_NODES",
    job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
)
OPEN_MPI = Launcher(
    "Open MPI",
    (),
    "OMPI_COMM_WORLD_RANK",
    ("OMPI_COMM_WORLD_SIZE",),
    "OMPI_COMM_WORLD_LOCAL_RANK",
    per_host="OMPI_COMM_WORLD_LOCAL_SIZE",
    job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
)
KUBERNETES = Launcher("Kubernetes", ("KUBERNETES_SERVICE_HOST",), "JOB_COMPLETION_INDEX", (), "")


@dataclass(frozen=True)
class Place:
    """This process among those of a run.

    coordinator: host:port, where process 0 listens. launcher: what said so. gpus: the GPUs of its host that it uses;
    None: all that it sees. run: which run it belongs to; empty where nothing says it.
    """

    process_id: int
    num_processes: int
    coordinator: str
    launcher: str = COORDINATOR
    gpus: tuple[int, ...] | None = None
    run: str = ""

    @property
    def host(self) -> str:
        """The host of the coordinator."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port at which it listens."""
        return int(self.coordinator.rpartition(":")[2])


def find_place(env: Mapping[str, str] = os.environ, timeout: float = 300) -> Place | None:
    """This process's place; None if it is a run of its own.

    timeout: seconds that Kubernetes has to give the host of process 0 a name. Raises UserError for variables that say
    half of it, and for a coordinator that other hosts cannot reach.
    """
    launcher = _launcher(env)
    if launcher is None and not any(name in env for name in (COORDINATOR, COUNT, ID)):
        return None
    given = {name: env[name] for name in (COORDINATOR, COUNT, ID) if name in env}
    if given.get(COUNT) == "1":
        return None
    if launcher is None:
        if missing := [name for name in (COORDINATOR, COUNT, ID) if name not in given]:
            raise UserError(
                f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} set and {', '.join(missing)} not: a process "
                "of several needs all three; to run one process, unset them"
            )
        place = Place(_number(env, ID), _number(env, COUNT), _address(given[COORDINATOR]), run=_run(None, env))
    else:
        count = _number(env, COUNT if COUNT in given else _count(launcher, env)) if launcher.num_processes else 0
        if count == 1:
            return None
        own = _number(env, ID if ID in given else launcher.process_id)
        if launcher is KUBERNETES:
            count = _number(env, COUNT) if COUNT in given else _pods(launcher)
        address = _address(given[COORDINATOR]) if COORDINATOR in given else _detected(launcher, env, timeout)
        place = Place(
            own, count, address, launcher.name, _gpus(launcher, env), _run(None if ID in given else launcher, env)
        )
    if place.num_processes < 1 or not 0 <= place.process_id < place.num_processes:
        raise UserError(
            f"this is process {place.process_id} of {place.num_processes}, as {place.launcher} says; processes are "
            f"numbered from 0 to {place.num_processes - 1}"
        )
    if place.num_processes > 1 and is_loopback(place.host) and _several_hosts(launcher, env):
        raise UserError(
            f"the coordinator {place.coordinator} is a loopback address, which each host takes for itself, and the "
            f"{place.num_processes} processes are on several hosts; set {COORDINATOR} to the name of process 0's host "
            "as the others know it, with a port"
        )
    return place if place.num_processes > 1 else None


def is_loopback(host: str) -> bool:
    """Whether a host's name or address means the host itself, whoever asks."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.startswith("localhost.")


def _launcher(env: Mapping[str, str]) -> Launcher | None:
    for launcher in (OPEN_MPI, SLURM, KUBERNETES):
        needs = all(name in env for name in (*launcher.needs, launcher.process_id))
        if needs and (not launcher.num_processes or any(name in env for name in launcher.num_processes)):
            return launcher
    return None


def _count(launcher: Launcher, env: Mapping[str, str]) -> str:
    """The variable that says how many processes there are."""
    return next(name for name in launcher.num_processes if name in env)


def _run(launcher: Launcher | None, env: Mapping[str, str]) -> str:
    """Which run this process belongs to, as a hash that does not tell the token."""
    job = () if launcher is None else tuple(env.get(name, "") for name in launcher.job)
    text = env.get(TOKEN) or (repr((launcher.name, job)) if launcher is not None and any(job) else "")
    return hashlib.sha256(text.encode()).hexdigest()[:32] if text else ""


def _number(env: Mapping[str, str], name: str) -> int:
    if not env[name].isdecimal():
        raise UserError(f"{name} is {env[name]!r}, and should be a number")
    return int(env[name])


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{COORDINATOR} is {text!r}, and should be host:port of process 0, such as node001:12345")
    return text


def _detected(launcher: Launcher, env: Mapping[str, str], timeout: float) -> str:
    from jax._src import clusters  # JAX has no public name for these

    cluster = {
        SLURM: clusters.SlurmCluster,
        OPEN_MPI: clusters.OmpiCluster,
        KUBERNETES: clusters.K8sCluster,
    }[launcher]
    try:
        if not cluster.is_env_present():
            raise RuntimeError(f"JAX finds no {launcher.name} here")
        return cluster.get_coordinator_address(int(timeout), env.get("JAX_COORDINATOR_PORT"))
    except Exception as error:  # whatever the client of a cluster raises
        raise UserError(
            f"{launcher.name} started this process and does not say where process 0 listens ({error}); set "
            f"{COORDINATOR} to host:port of process 0"
        ) from error


def _pods(launcher: Launcher) -> int:
    from jax._src import clusters

    try:
        if not clusters.K8sCluster.is_env_present():
            raise RuntimeError("the package kubernetes is not installed")
        return clusters.K8sCluster.get_process_count()
    except Exception as error:
        raise UserError(
            f"{launcher.name} started this process and does not say how many there are ({error}); set {COUNT} to "
            "the completions of the Job, or to 1 if each pod is a run of its own"
        ) from error


def _several_hosts(launcher: Launcher | None, env: Mapping[str, str]) -> bool:
    if launcher is None:
        return False  # whoever set the variables knows
    if launcher is SLURM:
        return int(env.get(launcher.hosts, "1")) > 1
    return launcher is KUBERNETES or env.get(launcher.per_host) != env[_count(launcher, env)]


def _gpus(launcher: Launcher, env: Mapping[str, str]) -> tuple[int, ...] | None:
    """The share of this process in the GPUs of its host, where several processes see the same ones."""
    here = _tasks_here(launcher, env)
    if here < 2 or "JAX_LOCAL_DEVICE_IDS" in env:
        return None
    seen = visible_gpus(env)
    bound = any(name in env for name in ("SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU", "SLURM_GPU_BIND"))
    if seen < 2 or bound:  # each sees its own
        return None
    if seen % here:
        raise UserError(
            f"{here} processes on the host {socket.gethostname()} see {seen} GPUs, which they cannot share evenly; "
            f"start one process a host or one a GPU, or set JAX_LOCAL_DEVICE_IDS for each"
        )
    each, first = seen // here, _number(env, launcher.local_id) * (seen // here)
    return tuple(range(first, first + each))


def _tasks_here(launcher: Launcher, env: Mapping[str, str]) -> int:
    text = env.get(launcher.per_host, "")
    if launcher is not SLURM:
        return int(text or 1)
    node = int(env.get("SLURM_NODEID", "0"))
    # Such as 4(x2),3: two nodes of four tasks and one of three.
    counts = [
        int(match[1])
        for part in text.split(",")
        if (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part))
        for _ in range(int(match[2] or 1))
    ]
    return counts[node] if node < len(counts) else 1


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """How many NVIDIA GPUs a process sees; CUDA is not loaded for it."""
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([name for name in chosen.split(",") if name.strip() and name.strip() not in ("-1", "NoDevFiles")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
