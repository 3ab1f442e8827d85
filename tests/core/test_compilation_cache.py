"""Compiled programs are kept for the next process, and a damaged cache is only slow."""

import os
import subprocess
import sys
from pathlib import Path

from jaxllm.core.compilation_cache import cache_root, keep_programs

# Compiles one program and says what became of it: its result to the last bit, and what JAX read.
PROGRAM = """
import sys
from jaxllm.core.compilation_cache import keep_programs, programs_read
from jaxllm.processes.environment import without_idle_cuda
without_idle_cuda()
keep_programs()
import jax, jax.numpy as jnp
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
x = jnp.arange(4096.0).reshape(64, 64)
with programs_read() as read:
    program = jax.jit(lambda x: jax.nn.softmax(jnp.sin(x) @ x.T)).lower(x).compile()
print(len(read), float(program(x).std()).hex(), program.memory_analysis().temp_size_in_bytes)
"""


def start(cache: Path, **environment: str) -> tuple[int, str, str]:
    """Programs read from the cache, the result, and what went to stderr."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**clean, "JAXLLM_CACHE": str(cache), "XLA_FLAGS": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, result = done.stdout.split(maxsplit=1)
    return int(read), result, done.stderr


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("programs/*/*-cache"))


def test_the_next_start_reads_what_the_last_one_compiled(tmp_path):
    """With the same bits and the same memory plan, and nothing said on stderr."""
    first, second = start(tmp_path), start(tmp_path)
    assert (first[0], second[0]) == (0, 1)
    assert first[1] == second[1]
    assert first[2] == second[2] == ""


def test_a_damaged_entry_is_compiled_again(tmp_path):
    _, result, _ = start(tmp_path)
    for entry in entries(tmp_path):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    read, again, said = start(tmp_path)
    assert (read, again) == (0, result)
    assert "Error reading persistent compilation cache entry" in said


def test_an_entry_that_a_kill_cut_short_is_written_anew(tmp_path):
    _, result, _ = start(tmp_path)
    for entry in entries(tmp_path):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
        entry.with_name(entry.name.removesuffix("-cache") + "-atime").unlink()
    assert start(tmp_path) == (0, result, "")
    assert start(tmp_path) == (1, result, "")


def test_jax_settings_come_first(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    start(tmp_path / "ours", JAX_COMPILATION_CACHE_DIR=str(elsewhere))
    assert list(elsewhere.glob("*-cache"))
    start(tmp_path / "ours", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not entries(tmp_path / "ours")
    # Without a limit JAX stamps no entry, and none is half written for that.
    unlimited = {"JAX_COMPILATION_CACHE_MAX_SIZE": "-1"}
    assert start(tmp_path / "unlimited", **unlimited)[0] == 0
    assert start(tmp_path / "unlimited", **unlimited)[0] == 1


def test_a_folder_that_cannot_be_written_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXLLM_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    assert cache_root() == tmp_path / "file"
    keep_programs()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
