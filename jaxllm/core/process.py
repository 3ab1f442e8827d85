"""What a command says of its process before it imports anything large."""

import sys
from typing import Any, cast


def without_torch() -> None:
    """Makes `import torch` fail in this process, as where it is not installed.

    transformers, of which we use the tokenizers alone, imports torch where it finds it: two more seconds at each
    start, a second runtime on the GPU, and an error where torch is damaged.
    """
    cast(dict[str, Any], sys.modules)["torch"] = None  # Python's own mark of a module that is not there
