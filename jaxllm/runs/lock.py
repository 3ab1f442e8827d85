"""One run at a time in a folder."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxllm.checkpoint.run_files import LOCK
from jaxllm.core.errors import UserError
from jaxllm.processes.distributed import gather, is_first

SHOWN_AFTER_S = 30.0  # in which a network disk shows a new file to other hosts


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Holds `folder`, which is made if it is not there, until the block ends or the process does, however it dies.

    The operating system's lock on a file is what counts, not that the file is there. A folder that was made and is
    still empty at the end goes again. Of a run of several processes, process 0 holds it for all. Raises UserError if
    another run holds it, if it cannot be written, and in a process that does not see what process 0 writes.
    """
    folder = folder.absolute()
    if is_first():
        with _held(folder):
            gather((folder / LOCK).read_text())
            yield
    else:
        _check_shared(folder, gather("")[0])
        yield


def _check_shared(folder: Path, written: str) -> None:
    deadline = time.monotonic() + SHOWN_AFTER_S
    while True:
        with suppress(OSError):
            if (folder / LOCK).read_text() == written:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"output_dir {folder} on {socket.gethostname()} is another folder than that of process 0 "
                f"({written.strip().partition(', ')[0]}); choose one on a disk that all hosts share"
            )
        time.sleep(0.1)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    lock, made = folder / LOCK, [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _lock(lock)
    except FileExistsError as error:
        raise UserError(f"output_dir {folder} is a file; choose another folder") from error
    except NotADirectoryError as error:
        there = next(path for path in folder.parents if path.exists())
        raise UserError(f"output_dir {folder}: {there} is a file; choose another folder") from error
    except OSError as error:
        _remove(made)
        raise UserError(f"output_dir {folder} cannot be written: {error.strerror}; choose another folder") from error
    try:
        yield
    finally:
        with suppress(OSError):  # a disk that broke meanwhile has been reported
            lock.unlink(missing_ok=True)
        os.close(file)
        _remove(made)


def _lock(path: Path) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):  # a network disk without locks
                return file
            holder = path.read_text().strip() or "another process"
            os.close(file)
            if error.errno != errno.EWOULDBLOCK:
                raise
            raise UserError(
                f"output_dir {path.parent} is in use by {holder}. Wait for it, end it, or choose another output_dir"
            ) from error
        if path.exists() and os.stat(path).st_ino == os.fstat(file).st_ino:
            break
        os.close(file)  # whoever held it before has just removed it
    os.ftruncate(file, 0)
    started = time.strftime("%Y-%m-%d %H:%M:%S %z")
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}, running since {started}\n".encode())
    return file


def _remove(made: list[Path]) -> None:
    for path in made:  # the innermost first
        with suppress(OSError):
            path.rmdir()
