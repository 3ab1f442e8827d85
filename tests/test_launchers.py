"""The launchers in scripts/launch: what they start, and that they are what their programs read."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxllm.processes.launch import find_place

FOLDER = Path(__file__).parents[1] / "scripts/launch"
ONE_HOST = FOLDER / "one_host.sh"
SHELL = [*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")]
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS")


# A line in one write: under PYTHONUNBUFFERED print writes in pieces, and those of two processes mix.
TELL_PLACE = f"import os; os.write(1, (' '.join(os.environ.get(v, 'None') for v in {VARIABLES}) + '\\n').encode())"


def launch(count: str, program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ONE_HOST), count, sys.executable, "-c", program],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_folder_has_a_launcher_for_each():
    assert {path.name for path in FOLDER.iterdir()} == {"one_host.sh", "slurm.sbatch", "kubernetes.yaml"}


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([str(shellcheck), str(script)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_each_process_gets_a_number_and_its_share_of_the_gpus():
    said = launch("2", TELL_PLACE, CUDA_VISIBLE_DEVICES="4,5,6,7")
    first, second = (line.split() for line in sorted(said.stdout.splitlines(), key=lambda line: line.split()[2]))
    assert first[0] == second[0]
    assert first[0].startswith("127.0.0.1:")
    assert (first[1:], second[1:]) == (["2", "0", "0,1"], ["2", "1", "2,3"])
    without = launch("1", TELL_PLACE, CUDA_VISIBLE_DEVICES="")
    assert without.stdout.split()[1:] == ["1", "0", "None"]


def test_the_status_is_the_first_that_is_not_zero():
    assert launch("3", "import os; raise SystemExit(7 * (os.environ['JAX_PROCESS_ID'] == '1'))").returncode == 7
    assert launch("2", "").returncode == 0


@pytest.mark.parametrize("arguments", [(), ("2",), ("two", "true"), ("0", "true")])
def test_a_wrong_call(arguments):
    ended = subprocess.run([str(ONE_HOST), *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("usage: ")


def test_gpus_that_cannot_be_shared():
    ended = launch("2", "", CUDA_VISIBLE_DEVICES="0,1,2")
    assert ended.returncode == 2
    assert "2 processes cannot share 3 GPUs evenly" in ended.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_once(tmp_path, number):
    program = f"""
import os, signal, time
signal.alarm(120)
caught = []
signal.signal({int(number)}, lambda *_: caught.append(1))
open({str(tmp_path)!r} + "/ready" + os.environ["JAX_PROCESS_ID"], "w")
while not caught:
    time.sleep(0.02)
time.sleep(0.5)
os.write(1, f"{{len(caught)}}\\n".encode())
raise SystemExit(9)
"""
    # What a shell runs with & ignores SIGINT, and so would all that these tests start.
    heeded = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", heeded, str(ONE_HOST), "2", sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while len(list(tmp_path.glob("ready*"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, number)  # as the terminal does
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert said.split() == ["1", "1"]
    assert process.returncode == 9


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the state of a process is read from /proc")
def test_a_stopped_process_is_ended_once_another_has_ended(tmp_path):
    program = f"""
import os, signal, sys, time
if os.environ["JAX_PROCESS_ID"] == "0":
    while not os.path.exists({str(tmp_path / "stopped")!r}):
        time.sleep(0.05)
    raise SystemExit(3)
open({str(tmp_path / "stopped")!r}, "w").close()
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(100)
"""
    begun, used = time.monotonic(), os.times().children_user + os.times().children_system
    ended = launch("2", program)
    assert ended.returncode == 3
    assert "is stopped and others have ended: it is sent SIGTERM" in ended.stderr
    assert time.monotonic() - begun < 60
    # A launcher that spins takes a core for the whole wait.
    assert os.times().children_user + os.times().children_system - used < 3


def test_processes_of_one_launch_share_a_token_of_their_own():
    tell = "import os; os.write(1, (os.environ['JAXLLM_RUN_TOKEN'] + '\\n').encode())"
    tokens = [launch("2", tell).stdout.split() for _ in range(2)]
    assert [len(set(pair)) for pair in tokens] == [1, 1]
    assert tokens[0][0] != tokens[1][0]
    assert len(tokens[0][0]) == 32


def test_kubernetes_gives_each_pod_its_place():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    env = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    (token,) = (item["valueFrom"] for item in container["env"] if item["name"] == "JAXLLM_RUN_TOKEN")
    assert token["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/controller-uid']"
    # What Kubernetes itself sets in a pod of an indexed Job.
    env |= {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
    place = find_place(env)
    assert place is not None
    assert (place.process_id, place.num_processes) == (1, job["spec"]["completions"])
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    assert place.host == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_slurm_starts_one_process_a_task():
    lines = (FOLDER / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"] == "TERM@120"  # to the processes, not to the script
    assert [line for line in lines if line.startswith("srun")]
