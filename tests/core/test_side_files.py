"""What lies beside the weights of a model is copied as it is, if it is whole."""

import pytest
from side_files import side_files

from jaxllm.core.errors import UserError
from jaxllm.core.side_files import SIDE_FILES, read_side_files


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
