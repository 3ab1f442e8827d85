"""Whether the files of a checkpoint, and the files that describe a run, are as they were written."""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Hashes and names as `sha256sum` writes them, so that `sha256sum --check` reads them.
SUMS = "SHA256SUMS"
# A comment for that tool: the hash of all lines below it, so that damage to the file itself is told from other damage.
_HEADER = re.compile(r"# the lines below have the SHA-256 ([0-9a-f]{64})")
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write_sums(folder: Path) -> None:
    """Writes the hash of every file below `folder` into its `SHA256SUMS`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_covered(path, folder)]
    sums = {path.relative_to(folder).as_posix(): [digest] for path, digest in digests_of(files)}
    (folder / SUMS).write_bytes(sums_content(sums))


def sums_content(sums: Mapping[str, Collection[str]]) -> bytes:
    """The `SHA256SUMS` of files, by their names: each holds what has one of its hashes."""
    lines = "".join(f"{digest}  {name}\n" for name in sums for digest in sorted(sums[name])).encode()
    return f"# the lines below have the SHA-256 {digest_of(lines)}\n".encode() + lines


def read_sums(folder: Path) -> dict[str, set[str]]:
    """What `sums_content` was given. Raises ValueError, saying why, for a `SHA256SUMS` that is damaged itself."""
    try:
        content = (folder / SUMS).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"its {SUMS} is missing (another version of jaxllm may have written none)") from None
    except OSError as error:
        raise ValueError(f"its {SUMS} cannot be read ({error.strerror})") from None
    first, _, rest = content.partition(b"\n")
    header = _HEADER.fullmatch(first.decode(errors="replace"))
    lines = (content if header is None else rest).decode(errors="replace").split("\n")
    matches = [match for line in lines[:-1] if (match := _LINE.fullmatch(line))]
    if not content:
        raise ValueError(f"its {SUMS} is empty")
    if len(matches) != len(lines) - 1 or lines[-1] or (header and header[1] != digest_of(rest)):
        raise ValueError(f"its {SUMS} is damaged itself: it was cut or changed")
    sums: dict[str, set[str]] = {}
    for digest, name in (match.groups() for match in matches):
        sums.setdefault(name, set()).add(digest)
    if header is None:  # of an older version: whether a line is missing, the folder itself must tell
        files = (path for path in sorted(folder.rglob("[!.]*")) if path.is_file() and _is_covered(path, folder))
        for name in (path.relative_to(folder).as_posix() for path in files):
            if name not in sums:
                raise ValueError(f"its {SUMS} is damaged itself: it does not name {name}")
    return sums


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the files that the `SHA256SUMS` of `folder` names, naming one; None if each is as it was
    written.

    It reads every file once, on several threads; of several processes each reads its `part` of them.
    """
    if not folder.is_dir():
        return "it is not there"
    try:
        wanted = read_sums(folder)
    except ValueError as error:
        return str(error)
    for name in wanted:
        if not (folder / name).is_file():
            return f"{name} is {'a folder' if (folder / name).is_dir() else 'missing'}"
    for path, digest in digests_of(folder / name for name in list(wanted)[part::parts]):
        name = path.relative_to(folder).as_posix()
        if digest not in wanted[name]:
            return f"{name} does not hold what was written"
    return None


def _is_covered(path: Path, folder: Path) -> bool:
    # What Orbax adds to the folder itself, in part after everything else; no restore reads it.
    return path.parent != folder or path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt", SUMS)


def digests_of(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Each of the files with its hash, or with why it cannot be read."""
    files = list(files)
    with ThreadPoolExecutor() as pool:  # hashing and reading both leave Python's lock to others
        yield from zip(files, pool.map(_digest, files), strict=True)


def digest_of(content: bytes) -> str:
    """The hash of the content of a file."""
    return hashlib.sha256(content).hexdigest()


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a disk that cannot read it any more
        return error.strerror or "unreadable"
