"""The file system behind a URL, as fsspec has it: how it is opened, how long it may be silent, and what it fails of."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from jaxllm.core.compilation_cache import cache_root
from jaxllm.core.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

STALL_SECONDS = 120  # a server from which nothing comes for so long is given up
HTTP = ("http", "https")
T = TypeVar("T")


def protocol_of(url: str) -> str:
    """What stands before `://`."""
    return url.partition("://")[0]


def public(url: str) -> str:
    """A URL for people: without the password before its host, and the signature behind `?`."""
    protocol, _, rest = url.partition("://")
    host, slash, path = (rest.partition("?")[0] if protocol in HTTP else rest).partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path}"


def open_file_system(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `url`, and how it names the file. Raises UserError for a protocol that fsspec does not know,
    ImportError for one whose package is missing."""
    import fsspec
    from fsspec.config import conf

    protocol, options = protocol_of(url), {}
    if protocol not in (known := fsspec.available_protocols()):
        raise UserError(f"{public(url)}: {protocol}:// is no protocol of fsspec.{did_you_mean(protocol, known)}")
    if protocol in ("file", "local"):
        raise UserError(f"{url} is on this machine; give its path, without {protocol}://")
    if protocol in HTTP:
        aiohttp: Any = import_module("aiohttp")  # which not every installation has
        # By itself aiohttp gives a download up after 5 minutes, asks no proxy, and unpacks what a server calls packed.
        stalls = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        client = {"timeout": stalls, "trust_env": True, "auto_decompress": False} | conf.get(protocol, {}).get(
            "client_kwargs", {}
        )
        options = {"client_kwargs": client, "headers": {"Accept-Encoding": "identity"}}
    fs, path = fsspec.url_to_fs(url, use_listings_cache=False, **options)
    # What a package logs of a failure, with a trace, reaches us as an exception too.
    logging.getLogger(type(fs).__module__.partition(".")[0]).setLevel(logging.CRITICAL)
    return fs, path


def within(call: Callable[[], T], heard: Callable[[], float] = lambda: 0.0) -> T:
    """The result of `call`. heard: when something last came of it, as `time.monotonic` has it.

    Raises TimeoutError when nothing has come for `STALL_SECONDS`.
    """
    result: Future[T] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    begun = time.monotonic()
    threading.Thread(target=work, daemon=True).start()  # a call that hangs does not keep the process from ending
    while not wait([result], timeout=1).done:
        if time.monotonic() - max(begun, heard()) > STALL_SECONDS:
            raise TimeoutError
    return result.result()


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Raises UserError for what goes wrong on the way to `url`: each file system has exceptions of its own."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{public(url)}: {_what_failed(url, error)}") from error


def _what_failed(url: str, error: Exception) -> str:
    # Over HTTP whatever fails is a FileNotFoundError, with what it was as its cause.
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    status = getattr(cause, "status", None)
    reason = f"{type(cause).__name__}: {cause}" if status is None else f"{status} {getattr(cause, 'message', '')}"
    reason = " ".join(reason.split()).replace(url, public(url))
    if isinstance(error, ImportError):
        return (
            f"the package that reads {protocol_of(url)}:// is not installed ({reason}); `pip install 'jaxllm[remote]'` "
            "installs the packages for https, s3 and gs"
        )
    if isinstance(error, TimeoutError):
        return f"the server has sent nothing for {STALL_SECONDS} seconds; check the network"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of the cache {cache_root()} is full; free some space there or set JAXLLM_CACHE to another"
    if status == 404 or (isinstance(error, FileNotFoundError) and cause is error):
        return "the server has no such file; look at its spelling"
    if status in (401, 403) or isinstance(error, PermissionError):
        return f"the server does not let you read it ({reason}); give it credentials (jaxllm/files/README.md)"
    return f"it cannot be read ({reason}); check the network and your credentials, or give the path of a copy"
