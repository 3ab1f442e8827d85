"""The repository stays small, plainly named and free of anybody's machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"jaxllm", "configs", "scripts", "tests", "pyproject.toml", "README.md"}
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}

# A home, a mounted disk or a temporary folder of one machine; every system has /usr/bin/env and /dev/null.
MACHINE_PATH = re.compile(r"(?<![\w./:}-])/(home|Users|root|mnt|work|workspace|scratch|tmp|var/tmp|opt)/[\w.-]+")


def tracked() -> list[str]:
    """The files of the repository; what git ignores is not in it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def machine_paths(text: str) -> list[str]:
    return [match.group() for match in MACHINE_PATH.finditer(text)]


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_are_short():
    long = {str(path): lines_of(path) for path in (ROOT / "jaxllm").rglob("*.py") if lines_of(path) > 500}
    assert long == {}


def test_recipes_fit_a_screen():
    long = {str(path): lines_of(path) for path in (ROOT / "configs").rglob("*.yaml") if lines_of(path) > 60}
    assert long == {}


def test_names_say_what_is_inside():
    folders = (ROOT / "jaxllm", ROOT / "scripts", ROOT / "tests")
    vague = [path for folder in folders for path in folder.rglob("*") if path.stem in VAGUE_NAMES]
    assert vague == []


def test_the_top_level_is_what_the_design_says():
    top = {name.partition("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_no_file_names_a_path_of_one_machine():
    found = {}
    for name in tracked():
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if name != "tests/test_sizes.py" and (paths := machine_paths(text)):
            found[name] = paths
    assert found == {}


@pytest.mark.parametrize("text", ["open('/home/ann/x')", "cd /workspace/x", "DATA=/mnt/data1", "(/scratch/b/python)"])
def test_machine_paths_are_seen(text):
    assert machine_paths(text)


@pytest.mark.parametrize(
    "text", ["#!/usr/bin/env bash", ">/dev/null", "a/home/b", "https://x.org/home/y", "path/tmp/x"]
)
def test_other_paths_are_not(text):
    assert machine_paths(text) == []
