"""What a run ran on."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "jaxllm",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Versions, devices, the command and, in a git checkout, the commit of the code."""
    devices = jax.devices()
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "devices": {"count": len(devices), "kind": devices[0].device_kind, "processes": jax.process_count()},
        "commit": _commit(),
    }


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
