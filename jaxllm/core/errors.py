"""The one exception that means "the user's input is wrong"."""

import difflib
import errno
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input from the user: the message names the thing, its value and the remedy.

    Commands print the message without a traceback and exit with status 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known name closest to `name`, or `""` when none is close."""
    near = nearest(name, known)
    return "" if near is None else f" Did you mean {near!r}?"


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name closest to `name`; of equally close ones, one with the same first letter. None: none is close.

    cutoff: the share of letters in common, from 0 to 1, from which a name is close.
    """

    def closeness(other: str) -> tuple[float, bool]:
        return difflib.SequenceMatcher(None, other, name).ratio(), other[:1] == name[:1]

    close = difflib.get_close_matches(name, list(known), n=5, cutoff=cutoff)
    return max(close, key=closeness, default=None)


_REMEDIES = {
    errno.EACCES: "give yourself the right to it, or choose another place",
    errno.EPERM: "give yourself the right to it, or choose another place",
    errno.EROFS: "choose a place on a disk that can be written",
    errno.ENOENT: "look at its spelling, and whether its disk is there",
    errno.EEXIST: "a file has the name of a folder, or a folder the name of a file; move it, or choose another name",
    errno.ENOTDIR: "a part of this path is a file and not a folder; move it, or choose another path",
    errno.EISDIR: "it is a folder where a file is meant; move it, or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle; remove one of them",
    errno.ENOSPC: "free some space, or choose another disk",
    errno.EDQUOT: "free some of your quota, or choose another disk",
    errno.EFBIG: "its disk holds no file of this size; choose another disk",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine; end other programs",
    errno.EIO: "its disk has failed; choose another disk",
    errno.ESTALE: "its network disk was taken away; mount it again",
}


def explained(error: Exception) -> str | None:
    """The one message about a file, a disk or a memory that cannot be used. None for any other error."""
    if isinstance(error, MemoryError):
        what = f": {error}" if str(error) else ""
        return f"the memory of this machine is too small{what}; choose a smaller model, length or batch"
    if not isinstance(error, OSError) or error.errno not in _REMEDIES:
        return None
    name = "a file" if error.filename is None else error.filename
    return f"{name}: {error.strerror}; {_REMEDIES[error.errno]}"
