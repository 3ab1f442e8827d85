"""Files behind URLs (s3://, gs://, https:// …) by fsspec: copied once into the cache, and read from there."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxllm.core.compilation_cache import alone, cache_root
from jaxllm.core.errors import UserError
from jaxllm.files.file_systems import HTTP, explained, open_file_system, protocol_of, public, within

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]*)://.+", re.DOTALL)
_COPY = re.compile(r".*/remote/[0-9a-f]{32}/(?P<protocol>[a-z][a-z0-9+.-]*)/(?P<rest>.+)", re.DOTALL)
# What file systems call a fact that changes with the content, the surest first.
_VERSIONS = (
    *("etag", "ETag", "generation", "md5Hash", "Content-MD5", "Digest"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "modify", "modificationTime", "created"),
)


class RemoteFile(NamedTuple):
    """A file behind a URL. Other content has another size or version. None: the server was not asked, or tells none."""

    url: str
    size: int | None = None
    version: str | None = None


class Listing(NamedTuple):
    """What a URL names. files: by name in the folder; of one file or a glob, in the last folder without a `*`."""

    is_folder: bool
    files: dict[str, RemoteFile]


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a URL to be read here; those of the Hugging Face Hub (hf://) are not."""
    found = _URL.fullmatch(os.fspath(path))
    return found is not None and found["protocol"] != "hf"


def shown(path: str) -> str:
    """A path for people: of a copy its URL, without passwords and signatures."""
    found = _COPY.fullmatch(path)
    return path if found is None else f"{found['protocol']}://{found['rest']}"


@functools.cache  # a process sees one state of it, whatever happens to it meanwhile
def find(url: str, *, deep: bool = True) -> Listing:
    """The files that `url` names: one, those that a glob matches, or those of a folder, with all below it if `deep`.

    A URL with a slash at its end is a folder's. Raises UserError when there is no file, or the server cannot be asked.
    """
    with explained(url):
        fs, path = open_file_system(url)
        special = re.search(r"[*?[]", url)
        is_glob = special is not None and not (protocol_of(url) in HTTP and special[0] == "?")
        before = url[: special.start() if special else None].rpartition("/")[0] + "/"
        found = within(lambda: _look(fs, path, open_file_system(before)[1] if is_glob else None, deep))
        is_folder = not is_glob and (url.endswith("/") or list(found) != [path])
        base = url.rstrip("/") + "/" if is_folder else before
        base_path = open_file_system(base)[1].rstrip("/") + "/"
    if not found:
        raise UserError(f"{public(url)} names no file; look at its spelling")
    names = {path.removeprefix(base_path): info for path, info in sorted(found.items())}
    return Listing(is_folder, {name: _file(base + name, info) for name, info in names.items()})


def _look(fs: AbstractFileSystem, path: str, before_glob: str | None, deep: bool) -> dict[str, dict[str, Any]]:
    """What the file system says of each file."""
    if protocol_of(path) in HTTP:
        fs.info(before_glob or path)  # globs and listings say nothing of an unreachable server
    if before_glob is not None:
        found: Any = fs.glob(path, detail=True)
    elif not path.endswith("/") and (info := fs.info(path))["type"] == "file":
        return {path: info}
    else:
        found = fs.find(path, detail=True, maxdepth=None if deep else 1)
    return {name: info for name, info in found.items() if info["type"] == "file" and not name.endswith("/")}


def copy(files: Sequence[RemoteFile], folder: Sequence[RemoteFile] | None = None) -> list[Path]:
    """Where the files are on this machine; those that the cache lacks in this version are copied.

    folder: all files of a folder that may be needed. They share one local folder, named by their versions. By default
    each file has its own. Raises UserError when the disk is too small, when nothing arrives for two minutes, and for a
    file that changes meanwhile.
    """
    files = [_asked(file) for file in files]
    together = None if folder is None else _key([_asked(file) for file in folder])
    root = cache_root() / "remote"
    copies = [root / (together or _key([file])) / _place(file.url) for file in files]
    missing = [(file, copy) for file, copy in zip(files, copies, strict=True) if not _is_whole(copy, file)]
    if not missing:
        return copies
    root.mkdir(parents=True, exist_ok=True)
    needed, free = sum(file.size or 0 for file, _ in missing), shutil.disk_usage(root).free
    if needed > free:
        others = len(missing) - 1
        more = f" and {others} other file{'s' if others > 1 else ''} take" if others else " takes"
        raise UserError(
            f"{public(missing[0][0].url)}{more} {decimal(needed)}, and the disk of the cache {root} has "
            f"{decimal(free)} free; set JAXLLM_CACHE to a folder on a larger disk"
        )
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        for file, copy in missing:
            task = bar.add_task(public(file.url), total=file.size)
            with alone(root.parent / "locks" / f"{hashlib.sha256(bytes(copy)).hexdigest()[:32]}.lock"):
                if not _is_whole(copy, file):  # no other process was first
                    _copy(file, copy, lambda count, task=task: bar.update(task, completed=count))
    return copies


def _copy(file: RemoteFile, copy: Path, progress: Callable[[int], object]) -> None:
    from fsspec import Callback

    changes = UserError(f"{public(file.url)} changes while it is copied; start again when nothing writes to it")
    heard = time.monotonic()

    def hear(_: object, arrived: int, **__: object) -> None:
        nonlocal heard
        heard = time.monotonic()
        progress(arrived)
        if file.size is not None and arrived > file.size:
            raise changes

    copy.parent.mkdir(parents=True, exist_ok=True)
    for left in copy.parent.glob(f"{copy.name}.*.partial"):  # by a killed process
        left.unlink(missing_ok=True)
    unfinished = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
    try:
        with explained(file.url):
            fs, path = open_file_system(file.url)
            arriving: Any = Callback(hooks={"hear": hear})
            within(lambda: fs.get_file(path, str(unfinished), callback=arriving), lambda: heard)
        if not _is_whole(unfinished, file) or _now(file.url) != file:
            raise changes
        unfinished.replace(copy)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_whole(copy: Path, file: RemoteFile) -> bool:
    return copy.is_file() and file.size in (None, copy.stat().st_size)


@functools.cache
def _asked(file: RemoteFile) -> RemoteFile:
    """The file with what the server tells of it, where a listing told no version."""
    return file if file.version is not None else _now(file.url)


def _now(url: str) -> RemoteFile:
    with explained(url):
        fs, path = open_file_system(url)
        return _file(url, within(lambda: fs.info(path)))


def _file(url: str, info: dict[str, Any]) -> RemoteFile:
    name = next((name for name in _VERSIONS if info.get(name)), None)
    if name is None:
        return RemoteFile(url, info.get("size"))
    value = info[name]  # a date, which some file systems list as a number
    return RemoteFile(url, info.get("size"), f"{name} {value.timestamp() if isinstance(value, datetime) else value}")


def _key(files: Sequence[RemoteFile]) -> str:
    return hashlib.sha256(json.dumps(sorted(files, key=lambda file: file.url)).encode()).hexdigest()[:32]


def _place(url: str) -> str:
    """The path of a copy below its key."""
    parts = [part for part in public(url).replace("://", "/", 1).split("/") if part not in ("", ".")]
    if ".." in parts:
        raise UserError(f"{public(url)} has '..' in it; name the folder that is meant")
    return "/".join(parts)
