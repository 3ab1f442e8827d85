"""Whether a checkpoint's files are as they were written."""

import json
from pathlib import Path

from jaxllm.core.errors import UserError

SIZES = "sizes.json"


def write_sizes(folder: Path) -> None:
    """Notes the size of every file in the folders of the checkpoint `folder`."""
    files = [path for path in folder.glob("*/**/*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    (folder / SIZES).write_text(json.dumps(sizes))


def check_sizes(folder: Path) -> None:
    """Raises UserError naming the first file of the checkpoint `folder` that is missing or has another size."""
    try:
        sizes: dict[str, int] = json.loads((folder / SIZES).read_text())
    except (OSError, ValueError) as error:
        raise UserError(damaged(folder, f"{SIZES} is missing or no JSON")) from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes instead of {size:,}"
            raise UserError(damaged(folder, f"{name} {what}"))


def damaged(folder: Path, what: str) -> str:
    """The message about a checkpoint that cannot be used."""
    return (
        f"the checkpoint {folder} cannot be read: {what}. To go on from an older one, set checkpoint.resume to it and "
        "output_dir to a new folder"
    )
