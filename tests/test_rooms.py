"""Each room has a page at its door that names every file in it."""

from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxllm"
ROOMS = sorted({path.parent.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("room", ROOMS)
def test_its_page_names_its_files(room: str) -> None:
    folder = PACKAGE / room
    page = (folder / "README.md").read_text()
    files = {path.name for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")}
    assert {name for name in files - {"__init__.py"} if f"`{name}" not in page} == set()
    assert [line for line in page.splitlines() if len(line) > 120 and not line.startswith("|")] == []
