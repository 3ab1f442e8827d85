"""How commands end: their exit status, and the one message about what the machine refuses."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm.core.command import exit_status
from jaxllm.core.config.bounds import NUMBERS
from jaxllm.core.errors import UserError
from jaxllm.runs.config import Config


def test_statuses(capsys):
    assert exit_status(lambda: None) == 0
    assert exit_status(lambda: 143) == 143

    def wrong() -> None:
        raise UserError("a: is wrong; mend it")

    assert exit_status(wrong) == 2
    assert capsys.readouterr().err == "error: a: is wrong; mend it\n"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / ("x" * 300)).mkdir(), "File name too long; choose a shorter name"),
        (lambda folder: (folder / "file" / "sub").mkdir(), "Not a directory; a part of this path is a file"),
        (lambda folder: (folder / "file").mkdir(), "File exists; a file has the name of a folder"),
        (lambda folder: (folder / "loop").read_text(), "its links lead in a circle"),
        (lambda folder: folder.read_text(), "Is a directory; it is a folder where a file is meant"),
        (lambda folder: (folder / "none").read_text(), "No such file or directory; look at its spelling"),
    ],
)
def test_what_a_disk_refuses_is_one_message(make, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert exit_status(lambda: make(tmp_path)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith(f"error: {tmp_path}")
    assert error.count("\n") == 1


def test_a_full_disk_and_a_full_memory(capsys):
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def allocate() -> None:
        bytearray(1 << 62)

    assert [exit_status(full), exit_status(allocate)] == [2, 2]
    disk, memory = capsys.readouterr().err.splitlines()
    assert disk == "error: a file: No space left on device; free some space, or choose another disk"
    assert memory.startswith("error: the memory of this machine is too small")


def test_a_lost_connection_is_no_message_about_files():
    def lost() -> None:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        exit_status(lost)


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys; from jaxllm.core.command import exit_status\n"
        "sys.exit(exit_status(lambda: [print('x' * 1000) for _ in range(1000)] and 0))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = f"{sys.executable} {program} | head -1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stderr == ""
    assert ended.stdout == "x" * 1000 + "\n141\n"


def test_every_number_of_a_config_has_bounds():
    numbers: list[dict[str, Any]] = []

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            if node.get("type") in ("int", "float"):
                numbers.append(node)
            for key, value in node.items():
                if key not in ("metadata", "serialization"):
                    collect(value)
        elif isinstance(node, list):
            for item in node:
                collect(item)

    collect(Config.__pydantic_core_schema__)
    assert len(numbers) > 200
    for number in numbers:
        lowest = number.get("ge", number.get("gt"))
        highest = float("inf") if number.get("allow_inf_nan") else number.get("le", number.get("lt"))
        assert lowest is not None
        assert lowest >= -NUMBERS
        assert highest is not None
