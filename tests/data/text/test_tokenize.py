"""Token by token against transformers on real data, and which tokens are trained."""

import copy
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig, read
from jaxllm.data.text.chat import RenderConfig
from jaxllm.data.text.formats import Renderer
from jaxllm.data.text.segments import Segment, Text, Tokens
from jaxllm.data.text.tokenize import NEVER, Encoder, fingerprint, parts_from_the_next_word, prompt_ids

NAMES = [
    "stories3M",
    "tinystories-656k",
    "tokenizers/llama2",
    "tokenizers/gpt2",
    "tokenizers/qwen2.5",
]
# These decode to exactly what was encoded.
LOSSLESS = ["tokenizers/gpt2", "tokenizers/qwen2.5", "tokenizers/llama2"]


@cache
def load(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


def some(count: int, config: SourceConfig) -> list[dict]:
    return [dict(record.columns) for record, _ in zip(read(config), range(count), strict=False)]


def alpaca(shared: Path) -> list[dict]:
    return some(400, SourceConfig(path=str(shared / "data/alpaca/alpaca_5k.json")))


def gsm8k(shared: Path) -> list[dict]:
    fields = {"prompt": "question", "completion": "answer"}
    return some(300, SourceConfig(path=str(shared / "data/gsm8k/train.jsonl"), fields=fields))


def encode(tokenizer, name: str, columns: list[dict]):
    renderer = Renderer(name, RenderConfig(), tokenizer, detected=False)
    rendered = [sample for record in columns for sample in renderer(record)]
    return rendered, [encoded.sample for encoded in Encoder(tokenizer).encode(rendered)]


def encode_one(tokenizer, *segments: Segment, document: bool):
    (encoded,) = Encoder(tokenizer).encode([Text(segments, document=document)])
    return encoded.sample


@pytest.mark.parametrize("name", NAMES)
def test_documents_have_the_ids_of_transformers_and_one_eos(shared: Path, name: str):
    tokenizer = load(shared / "models" / name)
    columns = some(40, SourceConfig(path=str(shared / "data/tinystories/valid.jsonl")))
    columns += some(40, SourceConfig(path=str(shared / "data/tinystories/train.txt"), separator="<|endoftext|>"))
    columns.append({"text": "  two  spaces, 日本語 🙂\n\n\ttab " + tokenizer.eos_token + " x"})
    _, samples = encode(tokenizer, "text", columns)
    has_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    assert has_bos == (name in NAMES[:3])
    for record, sample in zip(columns, samples, strict=True):
        assert sample.ids.tolist() == [*tokenizer(record["text"]).input_ids, tokenizer.eos_token_id]
        assert sample.trained[has_bos:].all()
        assert not sample.trained[: int(has_bos)].any()
        assert (sample.ids.dtype, sample.trained.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize(
    ("data", "form", "column"), [(alpaca, "instruction", "output"), (gsm8k, "prompt_completion", "completion")]
)
def test_the_trained_tokens_are_the_completion_and_eos(shared: Path, name: str, data, form: str, column: str):
    tokenizer = load(shared / "models" / name)
    columns = [record for record in data(shared) if record[column].strip()]
    rendered, samples = encode(tokenizer, form, columns)
    for record, text, sample in zip(columns, rendered, samples, strict=True):
        assert sample.ids.tolist() == [*tokenizer(str(text)).input_ids, tokenizer.eos_token_id]
        first = int(np.argmax(sample.trained))
        assert sample.trained[first:].all()
        assert not sample.trained[:first].any()
        decoded = tokenizer.decode(sample.ids[first:])
        assert decoded.endswith(record[column] + tokenizer.eos_token)
        # Where one token holds the prompt's end and the completion's start ("?$"), it is trained whole.
        excess = decoded.removesuffix(record[column] + tokenizer.eos_token)
        assert text.segments[0].text.endswith(excess)
        assert not excess or len(tokenizer.decode(sample.ids[first])) > len(excess)


def test_a_tokenizer_that_strips_and_joins_spaces(shared: Path):
    tokenizer = load(shared / "models/stories3M")
    columns = [record for record in alpaca(shared) if record["output"].strip()]
    _, samples = encode(tokenizer, "instruction", columns)
    for record, sample in zip(columns, samples, strict=True):
        kept = re.sub(" {2,}", " ", record["output"]).rstrip(" ")
        decoded = tokenizer.decode(sample.ids[sample.trained])
        assert decoded.lstrip(" ") == (kept + tokenizer.eos_token).lstrip(" ")


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen2.5", "tokenizers/llama2", "stories3M"])
def test_a_prompt_that_is_read_otherwise_when_it_is_asked_alone(shared: Path, name: str):
    """The prompts are tokenized alone here: their tokens, up to one that is trained, must be how the sample begins."""
    tokenizer = load(shared / "models" / name)
    long = "Translate: hello there my friend. " * 20
    pairs = [("A: ", "four"), ("A:", " four"), ("Q: 2\nA:", "four"), ("Hel", "lo world"), ("Q\n\n", "\nA")]
    pairs += [
        ("x = ", "12345"),
        ("def f():\n    ", "    return"),
        ("a\t", "b"),
        ("日本", "語です"),
        ("", "x"),
        (" ", "x"),
    ]
    pairs += [(long, "Bonjour"), (long + "->", " bonjour"), ("1234567890" * 10 + " =", "5"), ("the ", "the")]
    texts = [Text((Segment(prompt, False), Segment(answer, True))) for prompt, answer in pairs]
    found = Encoder(tokenizer).encode(texts)
    joined = []
    for (prompt, answer), result in zip(pairs, found, strict=True):
        asked = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
        given = tokenizer.backend_tokenizer.encode(prompt + answer, add_special_tokens=False).ids
        read = len(result.sample.ids) - int(result.sample.trained.sum()) - (result.sample.ids[0] != given[0])
        if given[: len(asked)] != asked or len(asked) != read:
            joined.append((prompt, answer))
    assert [pair for pair, result in zip(pairs, found, strict=True) if result.joined != NEVER] == joined
    assert {result.joined for result in found} <= {NEVER, *(len(prompt) for prompt, _ in pairs)}
    assert ("Hel", "lo world") in joined
    assert ("A:", " four") not in joined


def test_chat_on_real_data(shared: Path):
    tokenizer = load(shared / "models/tokenizers/qwen2.5")
    columns = some(60, SourceConfig(path=str(shared / "data/sgd_chat/dev.jsonl")))
    _, samples = encode(tokenizer, "messages", columns)
    for record, sample in zip(columns, samples, strict=True):
        expected = tokenizer.apply_chat_template(record["messages"], tokenize=True, return_dict=False)
        assert sample.ids.tolist() == expected
        said = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
        assert tokenizer.decode(sample.ids[sample.trained]) == "".join(f"{text}<|im_end|>" for text in said)


@given(texts=st.lists(st.tuples(st.text(alphabet="aé🙂 \n", max_size=6), st.booleans()), min_size=1, max_size=5))
@settings(max_examples=100, deadline=None)
def test_with_one_token_a_byte_exactly_the_trained_text_is_trained(byte_tokenizer, texts):
    sample = encode_one(byte_tokenizer, *(Segment(text, trained) for text, trained in texts), document=False)
    assert byte_tokenizer.decode(sample.ids) == "".join(text for text, _ in texts)
    assert byte_tokenizer.decode(sample.ids[sample.trained]) == "".join(text for text, on in texts if on)


def test_byte_pieces_of_one_character_share_its_fate(shared: Path):
    tokenizer = load(shared / "models/tokenizers/llama2")
    sample = encode_one(tokenizer, Segment("a🙂", False), Segment("🙂b", True), document=True)
    assert tokenizer.convert_ids_to_tokens(sample.ids[sample.trained]) == [
        *("<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "b", "</s>")
    ]


def test_a_token_over_a_border_is_trained(shared: Path):
    tokenizer = load(shared / "models/tokenizers/gpt2")
    segments = (Segment("Hello wor", False), Segment("ld", True))
    sample = encode_one(tokenizer, *segments, document=True)
    assert tokenizer.decode(sample.ids[sample.trained]) == " world<|endoftext|>"
    exact, clean = Encoder(tokenizer).encode(
        [Text(segments, exact=True), Text((Segment("Hello", False), Segment(" world", True)), exact=True)]
    )
    assert (exact.torn, clean.torn) == (True, False)


def test_nothing_trained_means_no_trained_eos(byte_tokenizer):
    rendered = [Text((Segment("prompt", False), Segment("", True))), Text((Segment("", True),))]
    with_prompt, empty = Encoder(byte_tokenizer).encode(rendered)
    assert not with_prompt.sample.trained.any()
    assert not len(empty.sample.ids)
    assert (with_prompt.end, empty.end) == (-1, -1)


def test_an_eos_of_the_tokenizers_own_is_not_doubled(byte_tokenizer):
    from tokenizers import processors

    closing = copy.deepcopy(byte_tokenizer)
    specials = [("<bos>", 256), ("<eos>", 257)]
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing("<bos> $A <eos>", special_tokens=specials)
    sample = encode_one(closing, Segment("ab", True), document=True)
    assert closing.decode(sample.ids) == "<bos>ab<eos>"
    assert sample.trained.tolist() == [False, True, True, True]


def test_special_tokens_of_a_template_are_read_even_where_text_is_not(byte_tokenizer):
    plain = copy.deepcopy(byte_tokenizer)
    plain.split_special_tokens = True
    segment = Segment("a<|end|>", True)
    chat, document = (encode_one(plain, segment, document=kind).ids.tolist() for kind in (False, True))
    end = plain.convert_tokens_to_ids("<|end|>")
    assert chat.count(end) == 1
    assert document.count(end) == 0


def test_a_tokenizer_without_eos(byte_tokenizer):
    endless = copy.deepcopy(byte_tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        encode_one(endless, Segment("ab", True), document=True)
    encode_one(endless, Segment("ab", True), document=False)


def test_a_character_that_shifts_the_offsets_is_refused(shared: Path):
    # transformers makes of this tokenizer one without an unknown token: it drops what it does not know.
    tokenizer = load(shared / "models/tinystories-656k")
    with pytest.raises(UserError, match="drops the character '🙂'"):
        encode_one(tokenizer, Segment("a🙂", False), Segment("b", True), document=True)
    encode_one(tokenizer, Segment("a🙂b", True), document=True)


def test_special_tokens_in_the_text_itself_are_not_doubled(byte_tokenizer):
    sample = encode_one(byte_tokenizer, Segment("<bos>a", False), Segment("b<eos>", True), document=True)
    assert byte_tokenizer.decode(sample.ids) == "<bos>ab<eos>"
    assert sample.trained.tolist() == [False, False, True, True]


def test_a_padding_token_that_is_the_eos_takes_nothing_from_it(byte_tokenizer):
    padding = copy.deepcopy(byte_tokenizer)
    padding.pad_token = padding.eos_token
    sample = encode_one(padding, Segment("a", False), Segment("b", True), document=True)
    assert padding.decode(sample.ids[sample.trained]) == "b<eos>"


def test_the_first_trained_end_of_each_kind(byte_tokenizer):
    eos = byte_tokenizer.eos_token_id
    on, off = np.ones(4, bool), np.array([True, True, True, False])
    rendered = [
        Text((Segment("ab", False), Segment("c", True))),
        Text((Segment("ab", False), Segment("c", True), Segment("<|end|>", True, ends=True)), document=False),
        Text((Segment("ab<|end|>", True),), document=False),
        Tokens(np.array([1, 2, eos, 3]), on, masked=False),
        Tokens(np.array([1, 2, 3, eos]), off, masked=True),
    ]
    assert [encoded.end for encoded in Encoder(byte_tokenizer).encode(rendered)] == [4, 3, -1, 2, -1]


def test_white_space_that_a_mark_swallows_does_not_make_it_trained(shared: Path):
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(load(shared / "models/tokenizers/llama2"))
    marks = [AddedToken(mark, rstrip=True, special=True) for mark in ("<|answer|>", "<|end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    segments = (Segment("<|answer|>\n", False), Segment("\n hi", True), Segment("<|end|>", True), Segment("\n", False))
    (encoded,) = Encoder(tokenizer).encode([Text(segments, document=False, exact=True)])
    assert not encoded.torn
    tokens = tokenizer.convert_ids_to_tokens(encoded.sample.ids)
    assert [token for token, on in zip(tokens, encoded.sample.trained, strict=True) if not on] == ["<|answer|>"]
    assert tokens[-1] == "<|end|>"


def test_the_fingerprint_follows_the_chat_template_and_not_earlier_calls(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    first = fingerprint(tokenizer)
    tokenizer("abc", truncation=True, max_length=2)
    assert fingerprint(tokenizer) == first
    tokenizer.chat_template = "{{ messages }}"
    assert fingerprint(tokenizer) != first


@pytest.mark.parametrize("added", ["", "<s>", "</s>", "<s> </s>", "<s> <s>"])
@pytest.mark.parametrize("text", ["Once upon a time", "", "<s>Once", "x</s>"])
def test_a_prompt_is_how_a_document_begins(added, text, shared):
    """Whatever special tokens the tokenizer puts around a text; the end of a document is not asked for."""
    folder = shared / "models/stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    front = [mark for mark in added.split() if mark == "<s>"]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = {"<s>": 1, "</s>": 2}
    pieces = [{"Sequence": {"id": "A", "type_id": 0}}]
    for mark in added.split():
        pieces.insert(len(pieces) if mark == "</s>" else 0, {"SpecialToken": {"id": mark, "type_id": 0}})
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {mark: {"id": mark, "ids": [ids[mark]], "tokens": [mark]} for mark in ids},
    }
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    prompt = prompt_ids(tokenizer, text)
    if not text:
        assert prompt == [1] * len(front)
        return
    # What follows begins a word, so the document's own tokens do not change.
    document = Encoder(tokenizer).encode([Text((Segment(text + "\n\nThe end.", True),))])[0].sample.ids.tolist()
    assert document[: len(prompt)] == prompt
    assert prompt[-1] != 2 or text.endswith("</s>")


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/qwen2.5", "tokenizers/llama2"])
def test_white_space_that_joins_the_next_word_is_seen(name, shared):
    tokenizer = load(shared / "models" / name)
    assert parts_from_the_next_word(tokenizer, "A: ")
    assert not parts_from_the_next_word(tokenizer, "A:")
    assert not parts_from_the_next_word(tokenizer, "A:\n")


def test_white_space_that_the_tokenizer_drops_does_no_harm(shared):
    assert not parts_from_the_next_word(load(shared / "models/stories260K"), "A: ")
