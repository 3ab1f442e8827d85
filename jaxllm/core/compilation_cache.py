"""The cache folder: token stores, and compiled programs that the next start reads instead of compiling."""

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import filelock

# The least recently used programs beyond this are removed. One program takes from 0.1 MiB to some tens.
PROGRAMS_BYTES = 4 * 2**30


def cache_root() -> Path:
    """The folder of all caches: `$JAXLLM_CACHE`, else `~/.cache/jaxllm`."""
    return Path(os.environ.get("JAXLLM_CACHE") or "~/.cache/jaxllm").expanduser()


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One of several processes does their common work; the others wait for it at the file `lock`.

    On a network disk without locks nobody waits.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        with suppress(NotImplementedError):
            held.enter_context(filelock.FileLock(lock))
        yield


def keep_programs() -> None:
    """Makes JAX keep compiled programs below `cache_root()`, for this process; called before JAX is imported.

    JAX's own settings come first: `JAX_COMPILATION_CACHE_DIR` is another folder, `JAX_ENABLE_COMPILATION_CACHE=false`
    turns it off, `JAX_COMPILATION_CACHE_MAX_SIZE` is another limit in bytes. A folder that cannot be written is not
    used. An entry that cannot be read is a warning of JAX, and the program is compiled.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_root() / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            _remove_half_written(folder)
    except (OSError, filelock.Timeout):
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS_BYTES))


def _processor() -> str:
    """The machine's instruction set: a home folder is shared by machines that cannot run each other's programs."""
    features = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    words = " ".join(sorted(features.split()))
    return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def _remove_half_written(folder: Path) -> None:
    """Removes what a killed process left: JAX would never write that entry again, nor remove old ones.

    With a limit of the folder's size, JAX writes `NAME-cache`, then `NAME-atime`, under this lock.
    """
    with filelock.FileLock(folder / ".lockfile", timeout=10):
        for entry in folder.glob("*-cache"):
            if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
                entry.unlink()


@contextmanager
def programs_read() -> Iterator[list[str]]:
    """A list that gets an item for each program that was read from the cache instead of compiled."""
    from jax import monitoring  # here, since `keep_programs` comes before JAX

    found: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            found.append(event)

    monitoring.register_event_listener(listen)
    try:
        yield found
    finally:
        monitoring.unregister_event_listener(listen)
