"""Whether a checkpoint's files are as they were written."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Hashes and names as `sha256sum` writes them, so that `sha256sum --check` reads them.
SUMS = "SHA256SUMS"


def write_sums(folder: Path) -> None:
    """Writes the hash of every file below `folder` into its `SHA256SUMS`."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_covered(path, folder)]
    lines = [f"{digest}  {path.relative_to(folder).as_posix()}\n" for path, digest in _digests(files)]
    (folder / SUMS).write_text("".join(lines))


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the checkpoint `folder`, naming a file; None if each file is as it was written.

    It reads every file once, on several threads; of several processes each reads its `part` of them.
    """
    if not folder.is_dir():
        return "it is not there"
    try:
        lines = (folder / SUMS).read_text().splitlines()
        wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    except (OSError, ValueError):
        return f"its {SUMS} is missing or unreadable (another version of jaxllm may have written none)"
    if not wanted:
        return f"its {SUMS} is empty"
    for name in wanted:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for path, digest in _digests(folder / name for name in list(wanted)[part::parts]):
        name = path.relative_to(folder).as_posix()
        if digest != wanted[name]:
            return f"{name} does not hold what was written"
    return None


def _is_covered(path: Path, folder: Path) -> bool:
    # What Orbax adds to the folder itself, in part after everything else; no restore reads it.
    return path.parent != folder or path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt", SUMS)


def _digests(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    files = list(files)
    with ThreadPoolExecutor() as pool:  # hashing and reading both leave Python's lock to others
        yield from zip(files, pool.map(_digest, files), strict=True)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # a disk that cannot read it any more
        return error.strerror or "unreadable"
