"""A run's folder belongs to one process, for as long as that process lives."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jaxllm.checkpoint.run_files import LOCK
from jaxllm.core.errors import UserError
from jaxllm.runs.lock import owned

HOLDER = """
import sys, time
from pathlib import Path
from jaxllm.runs.lock import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_another_process_is_refused_until_the_first_is_dead(tmp_path):
    folder = tmp_path / "runs" / "a"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError) as refused, owned(folder):
            pytest.fail("both have it")
        assert f"output_dir {folder} is in use by process {holder.pid} on {socket.gethostname()}" in str(refused.value)
        assert "running since 20" in str(refused.value)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (folder / LOCK).exists()  # a kill leaves the file, and the lock is gone
    (folder / "config.resolved.yaml").touch()
    with owned(folder):
        assert str(os.getpid()) in (folder / LOCK).read_text()
    assert os.listdir(folder) == ["config.resolved.yaml"]


def test_twice_in_one_process(tmp_path):
    with owned(tmp_path), pytest.raises(UserError, match=f"in use by process {os.getpid()} "), owned(tmp_path):
        pytest.fail("both have it")


def test_a_folder_that_stays_empty_goes_again(tmp_path):
    with owned(tmp_path / "runs/a/b"):
        assert (tmp_path / "runs/a/b").is_dir()
    assert os.listdir(tmp_path) == []


def test_folders_that_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match=r"cannot be written: .*; choose another folder"), owned(Path("/proc/run")):
        pass
    (tmp_path / "photo.jpg").touch()
    for folder in (tmp_path / "photo.jpg", tmp_path / "photo.jpg/run"):
        with pytest.raises(UserError, match=r"photo\.jpg is a file; choose another folder"), owned(folder):
            pass
