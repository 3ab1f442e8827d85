"""The files that describe a run are sealed, whenever a run is killed, and damage to any of them is named."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxllm.checkpoint import run_files
from jaxllm.checkpoint.integrity import SUMS
from jaxllm.checkpoint.run_files import begin_run, check_described, check_seal, is_sealed, update_run
from jaxllm.core.errors import UserError

CONFIG = "".join(f"{name}: 1\n" for name in run_files.SECTIONS).encode()
FILES = {
    "config.resolved.yaml": CONFIG,
    "env.json": b"{}\n",
    "model/config.json": b'{"vocab_size": 9}\n',
    "model/tokenizer.json": b'{"model": 1}\n',
}


@pytest.fixture
def run(tmp_path) -> Path:
    begin_run(tmp_path, FILES)
    (tmp_path / "metrics.jsonl").write_text("")  # what changes at each step is not sealed
    return tmp_path


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def deleted(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


WRONG = {
    flipped: "does not hold what was written",
    cut: "does not hold what was written",
    emptied: "does not hold what was written",
    deleted: "is missing",
    a_folder: "is a folder",
}


@pytest.mark.parametrize("damage", WRONG, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_named_with_the_remedy(name, damage, run):
    check_described(run)
    damage(run / name)
    with pytest.raises(UserError) as refused:
        check_seal(run)
    assert f"the run {run} is damaged: {name} {WRONG[damage]}. Put the file back" in str(refused.value)
    assert f"delete {run / SUMS}" in str(refused.value)


@pytest.mark.parametrize("damage", [flipped, cut, emptied, a_folder], ids=lambda damage: damage.__name__)
def test_damage_to_the_seal_names_the_seal(damage, run):
    damage(run / SUMS)
    with pytest.raises(UserError, match=rf"damaged: its {SUMS} (is damaged itself|is empty|cannot be read)"):
        check_seal(run)


def test_each_byte_of_the_seal_counts(run):
    whole = (run / SUMS).read_bytes()
    for place in range(0, len(whole), 5):
        for content in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            (run / SUMS).write_bytes(content)
            with pytest.raises(UserError, match=rf"damaged: its {SUMS} "):
                check_seal(run)


def test_the_seal_is_what_sha256sum_reads(run):
    tool = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "--algorithm", "256"]  # the name on a Mac
    subprocess.run([*tool, "--check", "--strict", "--quiet", SUMS], cwd=run, check=True)


class Killed(Exception):
    pass


NEW = {"config.resolved.yaml": CONFIG + b"# more steps\n", "env.json": b'{"again": 1}\n'}


@contextmanager
def killed_after(replaced: int, monkeypatch) -> Iterator[None]:
    """Ends a writer of files after a number of them; the last one is half written."""
    there, done = run_files._replace, []  # pyright: ignore[reportPrivateUsage]

    def replace(path: Path, content: bytes) -> None:
        if len(done) == replaced:
            path.with_name(run_files.unfinished(path.name)).write_bytes(content[:9])
            raise Killed
        done.append(path)
        there(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "_replace", replace)
        yield


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("replaced", range(4))
def test_a_kill_within_a_change_leaves_a_whole_run(replaced, sealed, run, monkeypatch):
    if not sealed:
        (run / SUMS).unlink()
    with killed_after(replaced, monkeypatch), pytest.raises(Killed):
        update_run(run, NEW)
    assert is_sealed(run) == (sealed or replaced > 0)
    check_described(run)
    for name in NEW:
        assert (run / name).read_bytes() in (FILES[name], NEW[name])
    update_run(run, NEW)
    check_described(run)
    assert {name: (run / name).read_bytes() for name in FILES} == {**FILES, **NEW}
    (run / "env.json").write_bytes(FILES["env.json"])
    with pytest.raises(UserError, match=r"env\.json does not hold"):  # the old content is no longer right
        check_seal(run)


@pytest.mark.parametrize("replaced", range(5))
def test_a_kill_within_the_beginning_leaves_a_run_that_begins_anew(replaced, run, monkeypatch):
    """No seal is there that names what is missing."""
    other = {**FILES, "model/config.json": b'{"vocab_size": 10}\n', "model/added_tokens.json": b"{}"}
    del other["model/tokenizer.json"]
    with killed_after(replaced, monkeypatch), pytest.raises(Killed):
        begin_run(run, other)
    assert not is_sealed(run)
    check_seal(run)
    begin_run(run, other)
    check_described(run)
    assert {path.name for path in (run / "model").iterdir()} == {"config.json", "added_tokens.json"}


def test_a_change_does_not_seal_what_was_damaged_meanwhile(run):
    emptied(run / "model/tokenizer.json")
    update_run(run, NEW)
    with pytest.raises(UserError, match=r"model/tokenizer\.json does not hold"):
        check_seal(run)


LOST = {
    "config.resolved.yaml": "config.resolved.yaml is missing",
    "model/config.json": "model/config.json is missing",
}


@pytest.mark.parametrize("name", LOST)
def test_a_run_without_seal_that_lacks_a_file(name, run):
    (run / SUMS).unlink()
    (run / name).unlink()
    assert run_files.is_run(run)
    with pytest.raises(UserError, match=f"{LOST[name]}. Put the file back"):
        check_described(run)


@pytest.mark.parametrize("lost", ["peft", "seed", "callbacks"])
def test_a_lost_section_is_not_filled_with_defaults(lost, run):
    (run / SUMS).unlink()
    (run / "config.resolved.yaml").write_bytes(CONFIG.replace(f"{lost}: 1\n".encode(), b""))
    with pytest.raises(UserError, match=rf"config\.resolved\.yaml: lacks {lost}, which every run writes"):
        check_described(run)
