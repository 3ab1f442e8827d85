"""Text as its tokens come: whole characters, stop strings, and the end."""

import pytest
from transformers import AutoTokenizer

from jaxllm.generate.text import Completion

TEXT = "Once upon a time, Zoë's 🐈‍⬛ said: “日本語!”\n\nShe naïvely smiled. 👩‍👩‍👧 The end.\n"


@pytest.fixture(scope="module", params=["stories260K", "tokenizers/llama2", "tokenizers/gpt2", "tokenizers/qwen2.5"])
def tokenizer(request, shared):
    return AutoTokenizer.from_pretrained(shared / "models" / request.param)


def ids_of(tokenizer, text, **options):
    return tokenizer(text, **options)["input_ids"]


def pieces_of(completion, tokens):
    pieces = []
    for token in tokens:
        assert completion.ended is None
        pieces.append(completion.push(token))
        if completion.ended:
            break
    return pieces


@pytest.mark.parametrize("begin", [0, 1, 4, 11])
def test_the_pieces_are_the_text_and_no_character_is_ever_halved(tokenizer, begin):
    ids = ids_of(tokenizer, TEXT)
    prompt, rest = ids[:begin], ids[begin:]
    completion = Completion(tokenizer, prompt, room=len(rest))
    pieces = pieces_of(completion, rest)
    whole, before = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, prompt))
    assert before + "".join(pieces) == whole
    assert "".join(pieces) == completion.text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 15  # it streams
    assert len(pieces) > len([piece for piece in pieces if piece])  # and some tokens are parts of characters
    assert completion.ended == "length"


def test_the_first_new_token_keeps_its_space(tokenizer):
    prompt, whole = ids_of(tokenizer, "Once upon"), ids_of(tokenizer, "Once upon a time")
    assert whole[: len(prompt)] == prompt
    completion = Completion(tokenizer, prompt, room=9)
    assert "".join(pieces_of(completion, whole[len(prompt) :])) == " a time"


def test_an_unfinished_character_is_shown_at_the_end_only(tokenizer):
    ids = ids_of(tokenizer, "cat 🐈", add_special_tokens=False)
    completion = Completion(tokenizer, [], room=len(ids) - 1)
    pieces = pieces_of(completion, ids[:-1])
    assert "".join(pieces[:-1]).rstrip() == "cat"
    assert pieces[-1].endswith("\ufffd")
    assert completion.ended == "length"


STOPS = [
    (["Zoë"], "Once upon a time, "),
    (["\n\n"], "Once upon a time, Zoë's 🐈‍⬛ said: “日本語!”"),
    (["日本"], "Once upon a time, Zoë's 🐈‍⬛ said: “"),
    (["n a tim"], "Once upo"),
    (["time, Zog", "naïve"], TEXT[: TEXT.index("naïve")]),
    (["smiled", "said"], "Once upon a time, Zoë's 🐈‍⬛ "),
    (["aid: “", "said: "], "Once upon a time, Zoë's 🐈‍⬛ "),
    (["never"], TEXT),
    (["The end.\n\n"], TEXT),
]


@pytest.mark.parametrize(("stop", "wanted"), STOPS, ids=str)
def test_a_stop_string_and_what_follows_is_cut_wherever_its_tokens_begin(tokenizer, stop, wanted):
    ids = ids_of(tokenizer, TEXT, add_special_tokens=False)
    completion = Completion(tokenizer, [], room=len(ids), stop=stop)
    shown = ""
    for piece in pieces_of(completion, ids):
        shown += piece
        assert wanted.startswith(shown)
    assert shown == completion.text == wanted
    assert completion.ended == ("length" if wanted == TEXT else "stop")


def test_a_stop_string_in_the_prompt_is_none(tokenizer):
    prompt, whole = ids_of(tokenizer, "stop here"), ids_of(tokenizer, "stop here we go")
    completion = Completion(tokenizer, prompt, room=9, stop=["here", "stop"])
    assert "".join(pieces_of(completion, whole[len(prompt) :])) == " we go"
    assert completion.ended is None


def test_stop_tokens_end_it_and_release_what_was_held(tokenizer):
    ids = ids_of(tokenizer, "The end is near", add_special_tokens=False)
    completion = Completion(tokenizer, [], room=99, stop_ids=[ids[-1], 7], stop=["end is not"])
    pieces = pieces_of(completion, ids)
    text = tokenizer.decode(ids[:-1], skip_special_tokens=True)
    assert "".join(pieces) == completion.text == text
    assert completion.ended == "stop"
