"""Which process this is, from the variables of each launcher."""

import pytest

from jaxllm.core.errors import UserError
from jaxllm.processes.launch import find_place, is_loopback

# As srun sets them for the second of four processes on two nodes (slurm.schedmd.com/srun.html, output environment).
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[007-008]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
# As mpirun of Open MPI 4 does.
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "node7:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}

OTHERS = (
    "JOB_COMPLETION_INDEX",
    "JAXLLM_RUN_TOKEN",
    "KUBERNETES_SERVICE_HOST",
    "PMIX_NAMESPACE",
    "SLURM_STEP_ID",
    "SLURM_STEP_NUM_TASKS",
)


@pytest.fixture
def place(monkeypatch):
    """`find_place` in an environment of these variables alone; JAX's own detection reads the real one."""

    def find(variables):
        for name in (*SLURM, *OPEN_MPI, *EXPLICIT, *OTHERS):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_place(variables, timeout=1)

    return find


def test_without_a_launcher_a_process_is_a_run_of_its_own(place):
    assert place({}) is None
    assert place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) is None  # a batch script before srun
    assert place({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert place({**SLURM, "JAX_NUM_PROCESSES": "1"}) is None
    assert place({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) is None  # a pod that is not of an indexed Job


def test_slurm(place):
    found = place(SLURM)
    assert (found.process_id, found.num_processes, found.launcher) == (3, 4, "Slurm")
    assert found.host == "node007"
    assert found.port == 61440 + 4711 - 4096  # JAX's: 4711 % 2¹² above the last 2¹² ports


def test_the_shell_of_an_interactive_step_is_one_process(place):
    # `salloc -n 4` starts it by `srun --interactive --preserve-env --pty`: the job's number of tasks stays.
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_ID": "4294967290"}
    alone = {**SLURM, **step, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert place(alone) is None
    assert place({**alone, "SLURM_STEP_NUM_TASKS": "4"}).num_processes == 4
    assert place({**SLURM, "SLURM_STEP_NUM_TASKS": "6"}).num_processes == 6


def test_runs_are_told_apart(place):
    def runs(*variables):
        return [place(each).run for each in variables]

    one, same, other_step, other_job = runs(
        {**SLURM, "SLURM_STEP_ID": "0"},
        {**SLURM, "SLURM_STEP_ID": "0", "SLURM_PROCID": "2"},
        {**SLURM, "SLURM_STEP_ID": "1"},
        {**SLURM, "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "4712"},
    )
    assert one == same != ""
    assert len({one, other_step, other_job}) == 3
    # Two steps that are made one run by hand have no job of their own.
    assert runs({**SLURM, "SLURM_STEP_ID": "1", "JAX_PROCESS_ID": "1"}, EXPLICIT) == ["", ""]
    token, again, other = runs(*({**EXPLICIT, "JAXLLM_RUN_TOKEN": text} for text in ("secret", "secret", "other")))
    assert token == again != other
    assert "secret" not in token


def test_open_mpi(place):
    found = place(OPEN_MPI)
    assert (found.process_id, found.num_processes, found.host) == (5, 8, "10.96.0.1")
    without = {name: value for name, value in OPEN_MPI.items() if "uri" not in name}  # Open MPI 5
    with pytest.raises(UserError, match=r"does not say where process 0 listens .* set JAX_COORDINATOR_ADDRESS"):
        place(without)
    assert place({**without, "JAX_COORDINATOR_ADDRESS": "node7:1234"}).coordinator == "node7:1234"


def test_kubernetes(place):
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    found = place({**pod, "JAX_COORDINATOR_ADDRESS": "jaxllm-0.jaxllm:55527", "JAX_NUM_PROCESSES": "2"})
    assert (found.process_id, found.num_processes, found.host) == (1, 2, "jaxllm-0.jaxllm")
    with pytest.raises(UserError, match="set JAX_NUM_PROCESSES to the completions of the Job, or to 1"):
        place(pod)


def test_three_variables(place):
    found = place(EXPLICIT)
    assert (found.process_id, found.num_processes, found.host, found.port) == (2, 4, "node7", 1234)
    assert place({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "[fe80::1]:99"}).host == "fe80::1"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"JAX_PROCESS_ID": None}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES are set and JAX_PROCESS_ID not"),
        ({"JAX_PROCESS_ID": "4"}, "this is process 4 of 4, .*numbered from 0 to 3"),
        ({"JAX_PROCESS_ID": "two"}, "JAX_PROCESS_ID is 'two', and should be a number"),
        ({"JAX_COORDINATOR_ADDRESS": "node7"}, "JAX_COORDINATOR_ADDRESS is 'node7', and should be host:port"),
    ],
)
def test_variables_that_make_no_sense(place, changes, message):
    with pytest.raises(UserError, match=message):
        place({name: value for name, value in {**EXPLICIT, **changes}.items() if value is not None})


@pytest.mark.parametrize("launcher", [SLURM, OPEN_MPI])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.1.1", "[::1]"])
def test_a_coordinator_that_each_host_takes_for_itself(place, launcher, host):
    with pytest.raises(UserError, match=r"a loopback address, which each host takes for itself, .* on several hosts"):
        place({**launcher, "JAX_COORDINATOR_ADDRESS": f"{host}:1234"})
    assert is_loopback(host.strip("[]"))
    assert not is_loopback("node007")


def test_on_one_host_a_loopback_coordinator_is_right(place):
    alone = {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "4"}
    assert place({**alone, "JAX_COORDINATOR_ADDRESS": "localhost:1234"}).host == "localhost"


@pytest.mark.parametrize(
    ("changes", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, (4, 5, 6, 7)),  # two processes on a node of eight
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        ({"CUDA_VISIBLE_DEVICES": "6"}, None),  # each process was given its own
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),  # JAX reads it
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_TASKS_PER_NODE": "3,1"}, None),  # alone on the second node
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_processes_of_a_host_share_its_gpus(place, changes, gpus):
    assert place({**SLURM, **changes}).gpus == gpus


def test_gpus_that_cannot_be_shared(place):
    with pytest.raises(UserError, match=r"2 processes on the host .* see 3 GPUs, which they cannot share evenly"):
        place({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2"})
