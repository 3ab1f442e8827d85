"""What a command says of its process: CUDA's compiler leaves a CPU alone, simulated devices do not get stuck."""

import os
import shutil
import subprocess
import sys

import pytest

from jaxllm.processes.environment import installed, quiet_libraries

PROGRAM = """
from jaxllm.processes.environment import without_idle_cuda
without_idle_cuda()
import jax
print(jax.devices()[0].platform)
"""

# Programs with collectives in a loop, each launched before the last has ended. Without threads enough it stands still
# within a second, on two cores and eight devices; a collective that waits for 10 s then aborts the process.
IN_FLIGHT = """
from jaxllm.processes.environment import prepare_backends
prepare_backends()
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((8,), ("x",))

def mixed(x):
    return x + 0.1 * jnp.tanh(jax.lax.all_gather(jnp.sin(x), "x").sum(0))

def several(x):
    looped, _ = jax.lax.scan(lambda x, _: (mixed(x), None), x, None, length=3)
    return looped + mixed(jnp.cos(x))

step = jax.jit(jax.shard_map(several, mesh=mesh, in_specs=P("x"), out_specs=P("x")))
x = jax.device_put(jnp.ones(32768), NamedSharding(mesh, P("x")))
for _ in range(300):
    x = step(x)
print(jnp.isfinite(x).all())
"""


def test_simulated_devices_that_wait_for_each_other_do_not_get_stuck():
    flags = [
        "--xla_force_host_platform_device_count=8",
        *(f"--xla_cpu_collective_{name}_timeout_seconds=10" for name in ("call_warn_stuck", "call_terminate")),
        "--xla_cpu_collective_timeout_seconds=10",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(
        [sys.executable, "-c", IN_FLIGHT], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


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
