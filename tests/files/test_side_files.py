"""What lies beside the weights of a model is copied as it is, if it is whole."""

from pathlib import Path

import pytest

from jaxllm.core.errors import UserError
from jaxllm.files.side_files import SIDE_FILES, check_kept, read_side_files
from tests.support.hub_cache import add_repository
from tests.support.side_files import side_files


def write(folder, files=None):
    for name, content in (side_files() if files is None else files).items():
        (folder / name).write_bytes(content)
    return folder


def test_every_kind_is_read_as_it_is(tmp_path, shared):
    assert read_side_files(write(tmp_path)) == side_files()
    assert side_files().keys() == set(SIDE_FILES)
    for folder in ("stories260K", "tinystories-656k", "tokenizers/gpt2", "tokenizers/qwen2.5"):
        there = {path.name: path.read_bytes() for path in (shared / "models" / folder).iterdir() if path.is_file()}
        wanted = {name: there[name] for name in SIDE_FILES if name in there}
        assert read_side_files(shared / "models" / folder) == wanted != {}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_cut_is_found_in_each(name, tmp_path):
    whole = side_files()[name]
    cuts = [b""] if name == "vocab.txt" else [b"", whole[:-3]]  # a list of words has no end by which to tell
    for cut in cuts:
        (tmp_path / name).write_bytes(cut)
        with pytest.raises(UserError, match="copy or download it again, or remove it") as refused:
            read_side_files(tmp_path)
        assert f"{tmp_path / name}: is damaged" in str(refused.value)


def test_each_cut_of_pieces_is_found(shared, tmp_path):
    whole = (shared / "models/stories260K/tokenizer.model").read_bytes()
    for kept in range(0, len(whole), 501):
        write(tmp_path, {"tokenizer.model": whole[:kept]})
        with pytest.raises(UserError, match=r"tokenizer\.model: is damaged"):
            read_side_files(tmp_path)


OTHERS = {
    "a list": ("special_tokens_map.json", b"[]", "must hold a JSON object, not a list"),
    "null": ("generation_config.json", b"null", "must hold a JSON object, not a NoneType"),
    "another kind of JSON": ("tokenizer.json", b'{"made": "up"}', "it is no tokenizer"),
    "nested too deeply": ("added_tokens.json", b'{"a":' * 100_000, "recursion"),
    "no UTF-8": ("merges.txt", b"a b\n\xff\xfe", "can't decode byte 0xff"),
    "a tag that no template has": ("chat_template.jinja", b"{% include 'a' %}{% secret %}", "line 1: .*unknown tag"),
    "a line that is cut": ("merges.txt", b"#version: 0.2\na b\nab", "line 3 is 'ab'"),
    "a text": ("tokenizer.model", b"SECRET\n", "neither a SentencePiece model nor tiktoken"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_of_another_kind(case, tmp_path):
    name, content, why = OTHERS[case]
    write(tmp_path, {name: content})
    with pytest.raises(UserError, match=why):
        read_side_files(tmp_path)


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "merges.txt").mkdir()
    with pytest.raises(UserError, match=r"merges\.txt: cannot be read \(Is a directory\)"):
        read_side_files(tmp_path)


@pytest.fixture
def linked(tmp_path):
    """A model's folder whose files are links out of it, each in another way."""
    (tmp_path / "user/blobs").mkdir(parents=True)
    (tmp_path / "user/blobs/secret").write_text("SECRET")
    (tmp_path / "user/secret.json").write_text("{}")
    model = tmp_path / "a/snapshots/model"
    model.mkdir(parents=True)
    (model / "tokenizer.json").write_bytes(side_files()["tokenizer.json"])
    (model / "chat_template.jinja").symlink_to(tmp_path / "user/blobs/secret")
    (model / "vocab.txt").symlink_to("../../../user/blobs/secret")
    (model / "inner").symlink_to(tmp_path / "user")
    (model / "added_tokens.json").symlink_to("inner/secret.json")
    # As the cache of the Hub, but for where the blob itself leads.
    (tmp_path / "a/blobs").mkdir()
    (tmp_path / f"a/blobs/{'0' * 40}").symlink_to(tmp_path / "user/secret.json")
    (model / "tokenizer_config.json").symlink_to(f"../../blobs/{'0' * 40}")
    (tmp_path / "a/blobs/notes.json").write_text("{}")
    (model / "special_tokens_map.json").symlink_to("../../blobs/notes.json")
    (model / "merges.txt").symlink_to(tmp_path / "nothing")
    return model


def test_a_link_out_of_the_folder_is_left_out_and_said(linked, capsys):
    assert read_side_files(linked).keys() == {"tokenizer.json"}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6
    links = sorted(path for path in linked.iterdir() if path.is_symlink() and path.name in SIDE_FILES)
    for path in links:
        assert sum(line.startswith(f"note: {path}: is not copied, for it is a link out of") for line in said) == 1
    with pytest.raises(UserError, match="would lack what it was trained with; if it belongs to the model, put a copy"):
        check_kept(linked)


def test_a_link_within_the_folder_and_the_cache_of_the_hub_are_followed(tmp_path, capsys):
    for folder in ("", "inner"):
        files = {str(Path(folder) / name): content for name, content in side_files().items()}
        snapshot = add_repository(tmp_path / f"hub{folder}", "model", "owner/name", files)
        assert all((snapshot / name).is_symlink() for name in files)
        assert read_side_files(snapshot / folder) == side_files()
        check_kept(snapshot / folder)
    (tmp_path / "model/files").mkdir(parents=True)
    for name, content in side_files().items():
        (tmp_path / "model/files" / name).write_bytes(content)
        (tmp_path / "model" / name).symlink_to(f"files/{name}")
    (tmp_path / "other name").symlink_to("model")
    assert read_side_files(tmp_path / "other name") == side_files()
    check_kept(tmp_path / "other name")
    assert capsys.readouterr().err == ""


def test_a_link_to_nothing_is_said(tmp_path, capsys):
    (tmp_path / "merges.txt").symlink_to("nothing")
    assert read_side_files(tmp_path) == {}
    assert "merges.txt: is not copied, for it is a link to nothing" in capsys.readouterr().err
