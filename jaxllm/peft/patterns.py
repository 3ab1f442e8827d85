"""Regular expressions of modules' names, which come from files and configs, matched within limits of time and memory.

Expressions mean what they mean in Python's `re`. One may backtrack for ever, so it is compiled and matched in a process
of its own, which the system stops; Ctrl-C works meanwhile.
"""

import json
import re
import subprocess
import sys
from functools import lru_cache

from jaxllm.core.errors import UserError

SECONDS, BYTES = 5, 2**30  # of one expression with all names, which takes milliseconds
_LONGEST = 10_000  # characters

# The processor's time is limited, and not the clock's: a busy machine makes no expression wrong.
_MATCHER = f"""
import json, re, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS + 1}))
if sys.platform == "linux":
    resource.setrlimit(resource.RLIMIT_AS, ({BYTES}, {BYTES}))
expression, names = json.load(sys.stdin)
try:
    compiled = re.compile(expression)
except (re.error, OverflowError, RecursionError) as error:
    answer = str(error)
else:
    answer = [name for name in names if compiled.fullmatch(name)]
json.dump(answer, sys.stdout)
"""


class ExpressionError(ValueError):
    """A text that is no regular expression, or one that takes too long."""


@lru_cache(maxsize=1024)
def matching(expression: str, names: tuple[str, ...], *, ends: bool = False) -> frozenset[str]:
    """Those of `names` that `expression` matches: the whole name, or where `ends`, what is behind one of its dots too.

    Raises ExpressionError.
    """
    if len(expression) > _LONGEST:
        raise ExpressionError(f"has {len(expression):,} characters, and the most are {_LONGEST:,}")
    whole = rf"(.*\.)?({expression})$" if ends else expression  # as in HF PEFT, whose groups a reference may name
    if re.fullmatch(r"[\w.-]*", expression):  # repeats nothing, so it cannot backtrack for long
        return frozenset(name for name in names if re.fullmatch(whole, name))
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    content = json.dumps([whole, names])
    try:
        done = subprocess.run(command, input=content, capture_output=True, text=True, timeout=60 * SECONDS, check=False)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise UserError(f"the regular expression {expression!r} could not be matched ({error}); try again") from error
    if done.returncode:
        raise ExpressionError(
            f"takes more than {SECONDS} seconds or {BYTES >> 30} GiB to match, as one with a repetition within a "
            "repetition does; write it without, or give a list of names"
        )
    answer = json.loads(done.stdout)
    if isinstance(answer, str):
        raise ExpressionError(f"is no regular expression: {answer}")
    return frozenset(answer)


def check(expression: str, *, ends: bool = False) -> None:
    """Raises ExpressionError unless `matching` takes it."""
    matching(expression, (), ends=ends)
