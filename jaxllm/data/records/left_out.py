"""Files of a folder that are not read because of their suffix: which, how many, and how to read them."""

import codecs
import os
from collections import defaultdict
from pathlib import Path

from jaxllm.data.records.splits import is_side
from jaxllm.files.compressed import SUFFIXES, Suffix

PEEK = 4096  # bytes at the beginning of a file that tell whether it is text


def left_out(path: str) -> str:
    """What to say of the files in the folder `path` that have no suffix of a data file; empty where there are none.

    Files that describe a data set, such as README.md, and hidden files are not counted.
    """
    folder = Path(os.path.expanduser(path))
    by_suffix: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()):
        if Suffix.of(name).kind is None and not is_side(name):
            by_suffix[os.path.splitext(name)[1]].append(name)
    if not by_suffix:
        return ""
    listed = ", ".join(f"{len(names):,} {suffix or '(none)'} such as {names[0]}" for suffix, names in by_suffix.items())
    texts = [suffix for suffix, names in by_suffix.items() if _is_text(folder / names[0])]
    remedies = (
        [f"to read them as text name them by a glob, such as {path.rstrip('/')}/**/*{texts[0]}, and set `format: text`"]
        if texts
        else []
    )
    if len(texts) < len(by_suffix):
        remedies.append(f"convert what is no text to one of {', '.join(SUFFIXES)}, and unpack archives")
    count = sum(map(len, by_suffix.values()))
    return f"{count:,} files in {path} have another suffix than data files: {listed}; {'; '.join(remedies)}"


def _is_text(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            beginning = stream.read(PEEK)
        codecs.getincrementaldecoder("utf-8")().decode(beginning)  # whose last character may be cut
    except (OSError, UnicodeDecodeError):
        return False
    return b"\0" not in beginning
