"""Checkpoints: what is written comes back, what is damaged is refused, and what need not stay goes."""

import random
import resource
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxllm.checkpoint import writer as writer_module
from jaxllm.checkpoint.integrity import SUMS, find_damage
from jaxllm.checkpoint.retention import CheckpointConfig
from jaxllm.checkpoint.store import Checkpoint, checkpoints, named_checkpoint
from jaxllm.checkpoint.writer import CheckpointWriter, Saved
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout, MeshConfig

STATES = {
    "one device": Layout.single,
    "eight devices": lambda: Layout.of(MeshConfig(data=2, fsdp=4)),
}


def state_of(step: int, layout: Layout | None = None) -> dict[str, Any]:
    """Distinct values for each step; `w` lies on the mesh, `count` on every device."""
    layout = layout or Layout.single()
    w = np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)
    return {
        "params": {"w": jax.device_put(w, layout.sharding("embed", None))},
        "count": jax.device_put(np.int32(step), layout.replicated),
    }


def abstract(state: dict[str, Any]) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def write(folder: Path, scores: Mapping[int, float], **config: Any) -> list[Saved]:
    """A run that saves each step of `scores`, whose metric has that value."""
    known: dict[int, float] = {}
    saved = []
    writer = CheckpointWriter(folder, CheckpointConfig(every=1, **config))
    for step, score in scores.items():
        known[step] = score
        saved += writer.save(step, state_of(step), {"step": step}, known)
    return [*saved, *writer.close()]


def kept(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints(folder)]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "checkpoints"
    write(folder, {1: 0.0, 2: 0.0, 3: 0.0}, keep=3)
    return folder


@pytest.fixture
def copy(three, tmp_path) -> Path:
    return shutil.copytree(three, tmp_path / "checkpoints")


# Writing.


@pytest.mark.parametrize("layout", STATES)
def test_the_next_step_may_have_the_buffers_as_soon_as_save_returns(layout, tmp_path):
    """Each state is given away to a step at once; what comes back is what was saved."""
    state = state_of(0, STATES[layout]())
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * -3 + 1, state), donate_argnums=0)
    wanted, shapes = [], abstract(state)
    with closing(CheckpointWriter(tmp_path, CheckpointConfig(keep=5))) as writer:
        for number in range(5):
            wanted.append(jax.tree.map(np.array, state))
            writer.save(number, state, {})
            given, state = state, step(state)
            assert given["params"]["w"].is_deleted()
    for number, values in enumerate(wanted):
        got = Checkpoint(tmp_path, number).restore(shapes)
        jax.tree.map(np.testing.assert_array_equal, got, values)


def test_a_step_runs_while_a_save_is_written(tmp_path, monkeypatch):
    written = threading.Event()
    monkeypatch.setattr(writer_module, "write_sums", lambda folder: written.wait(60))
    state = state_of(0)
    with closing(CheckpointWriter(tmp_path, CheckpointConfig())) as writer:
        writer.save(0, state, {})
        after = jax.jit(lambda x: x + 1, donate_argnums=0)(state["params"]["w"])
        assert np.isfinite(after).all()
        assert writer.finished() == []
        assert kept(tmp_path) == []
        assert not (tmp_path / "latest").exists()
        written.set()
        (saved,) = writer.wait()
    assert saved.step == 0
    assert saved.blocked_s < saved.save_s
    assert (kept(tmp_path), (tmp_path / "latest").read_text()) == ([0], "0\n")


def test_each_save_is_told_once(tmp_path):
    assert [saved.step for saved in write(tmp_path, {1: 0.0, 5: 0.0, 7: 0.0})] == [1, 5, 7]


def test_what_a_kill_left_is_cleaned_up(copy):
    for name in ("4.orbax-checkpoint-tmp", "1.deleted"):
        (copy / name / "state").mkdir(parents=True)
    (copy / "latest").write_text("2\n")
    with closing(CheckpointWriter(copy, CheckpointConfig())):
        assert {path.name for path in copy.iterdir()} == {"1", "2", "3", "latest"}
        assert (copy / "latest").read_text() == "3\n"


def test_what_is_being_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    """A kill while one is deleted leaves no half of it that counts."""
    listed, delete = [], shutil.rmtree

    def watched(folder: Path, **options: bool) -> None:
        listed.append(kept(tmp_path))
        delete(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    write(tmp_path, {1: 0.0, 2: 0.0, 3: 0.0}, keep=1)
    assert listed == [[2], [3]]


def test_a_full_disk_leaves_the_checkpoints_before_it(copy, capfd):
    before, limit = contents(copy), resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = CheckpointWriter(copy, CheckpointConfig(keep=9))
    large = {"params": {f"w{i}": jnp.ones((64, 1024)) for i in range(8)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        writer.save(4, large, {})
        with pytest.raises(UserError, match=r"failed: File too large\. Free some space"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(copy) == before
    assert capfd.readouterr() == ("", "")


# What stays.

LOSSES = {1: 5.0, 2: 2.0, 3: float("nan"), 4: 2.0, 5: 3.0, 6: 4.0}
STAYS = {
    "the newest": (dict(keep=2), [5, 6], None),
    "every third": (dict(keep=1, keep_every=3), [3, 6], None),
    "the least loss, the first of equals": (dict(keep=2, best="eval/a/loss"), [2, 5, 6], 2),
    "the greatest accuracy": (dict(keep=1, best="eval/a/accuracy"), [1, 6], 1),
    "the mode that is said": (dict(keep=1, best="eval/a/loss", best_mode="max"), [1, 6], 1),
    "all of it": (dict(keep=1, keep_every=3, best="eval/a/perplexity"), [2, 3, 6], 2),
}


@pytest.mark.parametrize("case", STAYS)
def test_what_stays(case, tmp_path):
    config, steps, best = STAYS[case]
    write(tmp_path, LOSSES, **config)
    assert kept(tmp_path) == steps
    assert (tmp_path / "latest").read_text() == "6\n"
    assert (tmp_path / "best").exists() == (best is not None)
    assert best is None or (tmp_path / "best").read_text() == f"{best}\n"


def test_the_best_stays_where_its_value_is_forgotten(tmp_path):
    """The metrics of a run were lost: what `best` names stays until a checkpoint has a value."""
    best = dict(keep=1, best="eval/a/loss")
    write(tmp_path, {1: 1.0, 2: 2.0}, **best)
    with closing(CheckpointWriter(tmp_path, CheckpointConfig(every=1, **best))) as writer:
        writer.save(3, state_of(3), {}, {})
    assert kept(tmp_path) == [1, 3]
    with closing(CheckpointWriter(tmp_path, CheckpointConfig(every=1, keep=1))) as writer:
        writer.save(4, state_of(4), {})
    assert {path.name for path in tmp_path.iterdir()} == {"4", "latest"}


@pytest.mark.parametrize("held", [b"", b"\xff\xfe", b"x\n", b"9\n"], ids=str)
def test_a_damaged_best_names_none(held, tmp_path):
    """Its value is forgotten too, so that nothing tells which it was."""
    write(tmp_path, {1: 1.0, 2: 2.0}, keep=2)
    (tmp_path / "best").write_bytes(held)
    with closing(CheckpointWriter(tmp_path, CheckpointConfig(every=1, keep=1, best="eval/a/loss"))) as writer:
        writer.save(3, state_of(3), {}, {})
    assert kept(tmp_path) == [3]


def test_names_of_checkpoints(copy):
    (copy / "best").write_text("2\n")
    found = {name: named_checkpoint(copy / name) for name in ("1", "latest", "best", "4", "newest")}
    assert {name: one and one.step for name, one in found.items()} == {
        "1": 1,
        "latest": 3,
        "best": 2,
        "4": None,
        "newest": None,
    }


@pytest.mark.parametrize("held", [b"", b"\xff\xfe\n", b"\0\0", b"../1\n"], ids=str)
def test_a_damaged_pointer_names_none(copy, held):
    (copy / "latest").write_bytes(held)
    assert named_checkpoint(copy / "latest") is None


BAD_CONFIGS = {
    "best without every": (dict(best="eval/a/loss"), "set every"),
    "keep_every that is never met": (dict(every=40, keep_every=100), "set it to 80 or 120"),
    "a metric without a direction": (dict(every=1, best="eval/a/bleu"), "set best_mode to min or max"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_cannot_be(case):
    settings, remedy = BAD_CONFIGS[case]
    with pytest.raises(ValidationError, match=remedy):
        CheckpointConfig(**settings)


# Damage.


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def covered(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint that a restore may read."""
    return [path for path in sorted(checkpoint.glob("*/**/*")) if path.is_file()] + [checkpoint / "facts.json"]


def flip_a_bit(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = rng.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def truncate(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: Path, rng: random.Random) -> None:
    path.unlink()


def every_file(folder: Path) -> Iterator[Path]:
    yield from (path.relative_to(folder) for path in covered(folder / "3"))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, delete], ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_named_and_an_older_checkpoint_offered(damage, copy):
    checkpoint, rng = Checkpoint(copy, 3), random.Random(0)
    files = list(every_file(copy))
    assert len(files) > 8
    for file in files:
        whole = (copy / file).read_bytes()
        if not whole:
            continue
        damage(copy / file, rng)
        with pytest.raises(UserError) as refused:
            checkpoint.verify()
        (copy / file).write_bytes(whole)
        name = str(file.relative_to("3"))
        what = "is missing" if damage is delete else "does not hold what was written"
        assert f"the checkpoint {copy}/3 is damaged: {name} {what}. " in str(refused.value)
        assert f"checkpoint.resume={copy}/2 goes on from there" in str(refused.value)
    checkpoint.verify()


def test_swapped_files_are_named(copy):
    shards = sorted((copy / "3/state").rglob("d/*"), key=lambda path: path.stat().st_size)[-2:]
    first, second = (path.read_bytes() for path in shards)
    shards[0].write_bytes(second)
    shards[1].write_bytes(first)
    with pytest.raises(UserError, match=f"state/.*d/({shards[0].name}|{shards[1].name}) does not hold"):
        Checkpoint(copy, 3).verify()


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, delete], ids=lambda damage: damage.__name__)
def test_damage_to_the_hashes_names_them(damage, copy):
    whole, rng = (copy / "3" / SUMS).read_bytes(), random.Random(1)
    for _ in range(20):
        (copy / "3" / SUMS).write_bytes(whole)
        damage(copy / "3" / SUMS, rng)
        assert str(find_damage(copy / "3")).startswith(f"its {SUMS} is ")


def test_hashes_of_an_older_version(copy):
    """They have no hash of their own: a line that is lost shows in the folder."""
    sums = copy / "3" / SUMS
    lines = sums.read_text().splitlines(keepends=True)[1:]
    sums.write_text("".join(lines))
    assert find_damage(copy / "3") is None
    (copy / "3/.nfs001").write_text("")  # a file that a network disk keeps for somebody who has it open
    assert find_damage(copy / "3") is None
    for left in (lines[1:], lines[:-1], [*lines[:-1], lines[-1][:40]], [*lines[:-1], "zz"], []):
        sums.write_text("".join(left))
        assert str(find_damage(copy / "3")).startswith(f"its {SUMS} is ")


def test_the_offer_is_whole_itself(copy):
    for step in (2, 3):
        flip_a_bit(copy / f"{step}/facts.json", random.Random(0))
    with pytest.raises(UserError, match=f"checkpoint.resume={copy}/1 goes on"):
        Checkpoint(copy, 3).verify()
    flip_a_bit(copy / "1/facts.json", random.Random(0))
    with pytest.raises(UserError, match="No older checkpoint beside it is whole; choose a new output_dir"):
        Checkpoint(copy, 3).verify()


def test_the_hashes_are_those_of_sha256sum(three):
    tool = ["sha256sum"] if shutil.which("sha256sum") else ["shasum", "--algorithm", "256"]  # the name on a Mac
    subprocess.run([*tool, "--check", "--strict", "--quiet", SUMS], cwd=three / "3", check=True)


def test_files_that_no_hash_covers_do_not_matter(copy):
    """Orbax writes them last; whatever they hold, the state that comes back is the same."""
    for name in {path.name for path in (copy / "3").iterdir() if path.is_file()} - {SUMS, "facts.json"}:
        flip_a_bit(copy / "3" / name, random.Random(2))
    checkpoint = Checkpoint(copy, 3)
    checkpoint.verify()
    got = checkpoint.restore(abstract(state_of(3)))
    np.testing.assert_array_equal(got["params"]["w"], state_of(3)["params"]["w"])


def test_a_state_with_other_leaves_is_of_another_version(three):
    other = abstract(state_of(3))
    other["loss_scale"] = other.pop("count")
    with pytest.raises(UserError) as refused:
        Checkpoint(three, 3).restore(other)
    said = str(refused.value)
    assert "written by another version of jaxllm" in said
    assert "it lacks loss_scale and it has the unknown count" in said
    assert f"model.path={three}/3" in said
    params = Checkpoint(three, 3).restore({"params": other["params"]}, partial=True)["params"]
    np.testing.assert_array_equal(params["w"], state_of(3)["params"]["w"])


OTHER_SHAPES = {
    "more rows": ((66, 32), np.float32, r"params/w has the shape \[64, 32\], and the model's is \[66, 32\]"),
    "fewer rows": ((60, 32), np.float32, r"params/w has the shape \[64, 32\], and the model's is \[60, 32\]"),
    "as many numbers": ((32, 64), np.float32, r"params/w has the shape \[64, 32\], and the model's is \[32, 64\]"),
    "no floats": ((64, 32), np.int32, "params/w is float32, and the model's is int32"),
}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("other", OTHER_SHAPES)
def test_a_state_of_other_shapes_is_refused(other, partial, three):
    """It was cut or filled with zeros, without a word."""
    shape, dtype, message = OTHER_SHAPES[other]
    wanted = abstract(state_of(3))
    wanted["params"]["w"] = jax.ShapeDtypeStruct(shape, dtype, sharding=Layout.single().replicated)
    with pytest.raises(UserError, match=f"/3 does not fit the model: {message}. Put back the run's model/config.json"):
        Checkpoint(three, 3).restore({"params": wanted["params"]} if partial else wanted, partial=partial)


def test_only_the_padding_of_a_vocabulary_is_cut_or_filled(tmp_path):
    """Of 61 tokens, as they lie on a mesh that splits them into four."""
    with closing(CheckpointWriter(tmp_path, CheckpointConfig(), paddable={"w": (0, 61)})) as writer:
        writer.save(1, state_of(1), {})
    checkpoint, wanted = Checkpoint(tmp_path, 1), abstract(state_of(1))

    def restored(rows: int, real: int) -> np.ndarray:
        wanted["params"]["w"] = jax.ShapeDtypeStruct((rows, 32), np.float32, sharding=Layout.single().replicated)
        return np.asarray(checkpoint.restore(wanted, paddable={"w": (0, real)})["params"]["w"])

    saved = np.asarray(state_of(1)["params"]["w"])
    np.testing.assert_array_equal(restored(61, 61), saved[:61])
    np.testing.assert_array_equal(restored(72, 61), np.pad(saved, ((0, 8), (0, 0))))
    for rows, real in ((60, 60), (62, 62)):
        with pytest.raises(UserError, match=f"w has a vocabulary of 61, and the model's is of {real}"):
            restored(rows, real)
