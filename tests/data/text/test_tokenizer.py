"""The trained tokenizer gives SentencePiece's ids and the exact text back; folders load."""

import io
import itertools
import json
import logging
import shutil
import subprocess
import sys
import sysconfig
import tokenize
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxllm.core.errors import UserError
from jaxllm.data.text.tokenizer import load_tokenizer, train_tokenizer

SPECIAL_TOKENS = ["<|unknown|>", "<|begin_of_text|>", "<|end_of_text|>", "<|padding|>"]


def standard_library() -> tuple[dict[Path, str], dict[Path, str]]:
    """The exact text of every source file, and of the files that are no text why they are none."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts, skipped = {}, {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages"} & set(path.relative_to(root).parts):
            continue
        content = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            # utf-8-sig would drop the byte order mark.
            texts[path] = content.decode("utf-8" if encoding == "utf-8-sig" else encoding)
        except (SyntaxError, UnicodeDecodeError) as error:
            skipped[path] = str(error)
    return texts, skipped


@pytest.fixture(scope="module")
def sources() -> dict[Path, str]:
    return standard_library()[0]


@pytest.fixture(scope="module")
def sample(sources) -> list[str]:
    return list(sources.values())[:: len(sources) // 60]


@pytest.fixture(scope="module")
def folder(sample, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sample, 1024, folder)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def assert_faithful(texts: list[str], tokenizer, reference) -> None:
    expected = reference.encode(texts)
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == expected
    assert tokenizer.batch_decode(expected) == texts
    assert reference.decode(expected) == texts


def test_standard_library_sample(sample, tokenizer, reference):
    assert len(sample) >= 60
    assert_faithful(sample, tokenizer, reference)


@pytest.mark.full
def test_whole_standard_library(tokenizer, reference):
    sources, skipped = standard_library()
    for path, reason in skipped.items():
        print(f"skipped {path}: {reason}")
        # Python's own tests hold files that are wrong on purpose; nothing else may be left out.
        assert {"test", "tests"} & set(path.parts), f"{path}: {reason}"
    assert len(sources) > 1000
    assert_faithful(list(sources.values()), tokenizer, reference)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   leading, inner   and trailing   ",
        "\tdef f():\n\t    return  1\n\n\n",
        "a\r\nb\rc\x0cd\x0be\x00f\x1b\x7f\x85",
        "\ufeffbyte order mark",
        "\u2581 is what SentencePiece writes for a space \u2581\u2581",
        "\u2585 is what it writes for the unknown; \ufffd \u2028 \u00a0 \u3000",
        "astral \U0001d4b3 🙂 👩‍👩‍👧 e\u0301 é 漢字 עברית",
        "<s> </s> <unk> <pad> <0x0A> <0x41> " + " ".join(SPECIAL_TOKENS),
        "<|begin_of_text|><|end_of_text|>",
        "x" * 20_000 + " " * 20_000 + "-=" * 10_000,
    ],
)
def test_hard_texts(text, tokenizer, reference):
    assert_faithful([text], tokenizer, reference)


@settings(max_examples=300, deadline=None)
@given(
    st.text() | st.lists(st.sampled_from(["\u2581", " ", "  ", "\n", "\t", "\r", "a", *SPECIAL_TOKENS])).map("".join)
)
@example("\u2581 \n<|end_of_text|>")
def test_any_text(tokenizer, reference, text):
    assert_faithful([text], tokenizer, reference)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_sequence_of_pieces(tokenizer, reference, data):
    pieces = [reference.id_to_piece(i) for i in range(4 + 256, len(reference))]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=40)))
    assert_faithful([text], tokenizer, reference)


def test_equal_scores_meet_in_every_short_text(tmp_path):
    # Over two letters, many pairs of pieces make one piece and overlap: here the order of merges decides.
    short = ["".join(letters) for n in range(1, 13) for letters in itertools.product("ab", repeat=n)]
    train_tokenizer(["".join(short[i::7]) for i in range(7)] + short, 4 + 256 + 2 + 2 + 120, tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert_faithful(short, load_tokenizer(tmp_path), reference)


def test_documents_begin_with_bos_and_have_no_eos(tokenizer, reference):
    text = "def f(x):\n    return x\n"
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *reference.encode(text)]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens_are_where_sentencepiece_has_them(tokenizer, reference):
    special = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert special == (reference.unk_id(), reference.bos_id(), reference.eos_id(), reference.pad_id())
    assert len(set(special)) == 4
    assert len(tokenizer) == len(reference) == 1024


def test_newlines_tabs_and_indentation_are_pieces(tokenizer):
    pieces = tokenizer.tokenize("\n\n\t        x = 10")
    assert pieces[:4] == ["\n", "\n", "\t", "        "]
    assert pieces[-2:] == ["1", "0"]


def test_stays_the_same_beside_a_llama_config_and_when_saved_again(folder, tokenizer, sample, tmp_path):
    shutil.copytree(folder, tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    exported = load_tokenizer(tmp_path / "export")
    exported.save_pretrained(tmp_path / "again")
    texts = [*sample[:5], "<s> <|end_of_text|> \u2581 "]
    expected = tokenizer(texts)["input_ids"]
    assert exported(texts)["input_ids"] == expected
    assert load_tokenizer(tmp_path / "again")(texts)["input_ids"] == expected


def test_training_is_deterministic(folder, sample, tmp_path):
    train_tokenizer(iter(sample), 1024, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_a_line_of_any_length_is_trained_on(tmp_path):
    words = " ".join(f"zyzzyva{letter}" for letter in "abcdefgh" * 2000)
    train_tokenizer([words], 300, tmp_path)
    assert any("zyzzyva" in piece for piece in load_tokenizer(tmp_path).get_vocab())


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 400, "There is no text"),
        (["", "\n"], 400, "There is no text"),
        (["hello"], 4000, "4000.*value <= "),
        (["hello"], 200, "200.*Increase vocab_size$"),
    ],
)
def test_unfit_vocab_size(texts, vocab_size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["llama2", "gpt2", "qwen2.5"])
def test_published_tokenizers(shared, name):
    folder = shared / "models" / "tokenizers" / name
    expected = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder)
    assert expected["samples"]
    for sample in expected["samples"]:
        assert tokenizer.encode(sample["text"], add_special_tokens=False) == sample["ids"]
    if "chat" in expected:
        rendered = tokenizer.apply_chat_template(
            expected["chat"]["messages"], tokenize=False, add_generation_prompt=True
        )
        assert rendered == expected["chat"]["rendered"]


@pytest.mark.parametrize("name", ["stories260K", "stories3M", "tinystories-656k", "tinystories-656k-bf16"])
def test_tokenizers_of_published_models(shared, name):
    folder = shared / "models" / name
    expected = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer(expected["prompt"])["input_ids"] == expected["prompt_ids"]
    ids = expected["prompt_ids"] + expected["greedy_new_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == expected["greedy_text"]


def test_folders_that_hold_no_tokenizer(folder, tmp_path):
    with pytest.raises(UserError, match=r"missing does not exist; give the folder that holds tokenizer\.json"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="is a file"):
        load_tokenizer(folder / "tokenizer.json")
    with pytest.raises(UserError, match="holds no tokenizer; it needs"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match=r"has a tokenizer\.model alone"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path)


def write_gpt2_folder(folder: Path, tokenizer_class: str, **config) -> None:
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "b": 1, "<unk>": 2}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": tokenizer_class, "unk_token": "<unk>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_in_python_is_refused(tmp_path):
    write_gpt2_folder(tmp_path, "CTRLTokenizer")
    with pytest.raises(UserError, match="is a CTRLTokenizer, which transformers has only in Python"):
        load_tokenizer(tmp_path)


def test_no_code_of_the_folder_runs(tmp_path):
    write_gpt2_folder(tmp_path, "MyTokenizer", auto_map={"AutoTokenizer": ["mine.MyTokenizer", None]})
    (tmp_path / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import PreTrainedTokenizer\n"
        "class MyTokenizer(PreTrainedTokenizer): pass\n"
    )
    with pytest.raises(UserError, match="contains custom code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_transformers_is_silent_about_torch_alone(tokenizer):
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        logger.warning("PyTorch was not found. Models won't be available.")
        logger.warning("another warning")
    finally:
        logger.removeHandler(handler)
    assert heard == ["another warning"]


def test_import_does_not_import_transformers():
    code = "import sys, jaxllm.data.text.tokenizer; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
