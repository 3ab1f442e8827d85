"""What a command says of its process: CUDA's compiler does not disturb what runs on a CPU."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxllm.core.process import installed, quiet_libraries

PROGRAM = """
from jaxllm.core.process import without_idle_cuda
without_idle_cuda()
import jax
print(jax.devices()[0].platform)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA's compiler is for Linux alone")
def test_the_compiler_of_cuda_does_not_disturb_a_cpu():
    """JAX finds the plugin at each start, and would say with a traceback that there is no driver."""
    assert installed("jax-cuda12-plugin")
    environment = {**os.environ, "JAX_PLATFORMS": ""}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    expected = "gpu" if shutil.which("nvidia-smi") else "cpu"
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, expected, "")


def test_what_libraries_write_is_dropped_meanwhile(capfd):
    with quiet_libraries():
        os.write(2, b"from a library\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "after\n"


def test_what_is_installed():
    assert installed("jax")
    assert not installed("a-package-of-no-name")
