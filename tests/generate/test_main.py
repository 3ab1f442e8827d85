"""The command: what it completes, and what it says about wrong input."""

import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxllm.generate.__main__ import main
from tests.support.whole_runs import train, workplace

PROMPT = ["--prompt", "Once upon a time"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared):
    """A run of two steps, with a checkpoint of each."""
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        model = f"model={{path: {shared / 'models/stories260K'}}}"
        yield train(config, model, "train.steps=2", "checkpoint.every=1", "evals.0.every=9").folder


@pytest.fixture
def story(shared, tmp_path) -> Path:
    """A copy of stories260K that a test may change."""
    folder = shutil.copytree(
        shared / "models/stories260K", tmp_path / "model", ignore=shutil.ignore_patterns("llama2c")
    )
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def completes(capsys, *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments: object) -> str:
    try:
        status = main([*map(str, arguments)])
    except SystemExit as exit:  # what argparse finds wrong itself
        status = exit.code
    assert status == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(("error: ", "usage: "))
    return said.err


def test_a_hugging_face_folder(shared, capsys):
    folder = shared / "models/stories260K"
    reference = json.loads((folder / "reference.json").read_text())
    text = completes(capsys, folder, *PROMPT, "--max-new-tokens", 20)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    assert (reference["prompt"] + reference["greedy_text"].removeprefix(reference["prompt"])).startswith(text[:-1])


def test_a_run_is_its_newest_checkpoint_and_its_export(run, capsys):
    texts = [
        completes(capsys, folder, *PROMPT, "--max-new-tokens", 20)
        for folder in (run, run / "checkpoints/2", run / "export/hf", run / "checkpoints/1")
    ]
    assert texts[0] == texts[1] == texts[2]
    assert texts[3] != texts[0]


def test_two_prompts_and_a_seed(shared, capsys):
    def sample(seed: int) -> str:
        options = ["--prompt", "Tom", "--temperature", 0.8, "--top-p", 0.9, "--max-new-tokens", 8, "--seed", seed]
        return completes(capsys, shared / "models/stories260K", *PROMPT, *options)

    first = sample(1)
    parts = first.split("\n" + "-" * 60 + "\n")
    assert len(parts) == 2
    assert parts[0].startswith("Once upon a time")
    assert parts[1].startswith("Tom")
    assert sample(2) != first


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_it_stops_where_the_model_s_files_say(where, story, capsys):
    """A list of stop tokens, as chat models have it; without generation_config.json the one of config.json."""
    whole = completes(capsys, story, *PROMPT, "--max-new-tokens", 20)
    reference = json.loads((story / "reference.json").read_text())
    comma = reference["greedy_new_ids"][0]
    if where == "config.json":
        (story / "generation_config.json").unlink()
    content = json.loads((story / where).read_text())
    (story / where).write_text(json.dumps({**content, "eos_token_id": [2, comma]}))
    assert whole.startswith("Once upon a time,")
    assert completes(capsys, story, *PROMPT, "--max-new-tokens", 20) == "Once upon a time\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", 0], "--max-new-tokens must be at least 1"),
        (["--temperature", -1], "temperature must be at least 0"),
        (["--top-k", 5], "top_k 5: .* temperature 0 takes the most likely token"),
        (["--temperature", 1, "--top-p", 2], "top_p must be above 0 and at most 1"),
        (["--stop", ""], "--stop is empty"),
        (["--system", "Be kind."], "--system begins a conversation; give --chat"),
        (["--prompt", "a" + chr(0xDC80)], r"is not valid UTF-8"),
        (["--prompt", "word " * 600], "positions leave no room"),
        (["--seed", -1], "--seed must be from 0"),
    ],
    ids=str,
)
def test_wrong_options(options, message, shared, capsys):
    assert re.search(message, fails(capsys, shared / "models/stories260K", *PROMPT, *options))


def test_folders_without_a_model(run, tmp_path, capsys):
    assert "there is no such folder" in fails(capsys, tmp_path / "nowhere", *PROMPT)
    assert "has no config.json" in fails(capsys, tmp_path, *PROMPT)
    assert "there is no such folder" in fails(capsys, run / "checkpoints/7", *PROMPT)
    begun = shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints"))
    assert f"{begun}: the run has no complete checkpoint yet" in fails(capsys, begun, *PROMPT)
    (begun / "checkpoints").mkdir()
    assert f"{begun}: the run has no complete checkpoint yet" in fails(capsys, begun, *PROMPT)


def test_broken_folders(run, story, tmp_path, capsys):
    (story / "generation_config.json").write_text("{")
    assert "generation_config.json: is not valid JSON" in fails(capsys, story, *PROMPT)
    config = json.loads((story / "config.json").read_text())
    (story / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    assert "hidden_size" in fails(capsys, story, *PROMPT) or "shape" in fails(capsys, story, *PROMPT)
    damaged = shutil.copytree(run, tmp_path / "damaged")
    shutil.rmtree(damaged / "checkpoints/2/state")
    assert f"the checkpoint {damaged}/checkpoints/2 is damaged: state/" in fails(capsys, damaged, *PROMPT)


def test_the_options_of_a_model_come_from_its_file(story, capsys):
    """An instruction model samples and names several ends; what is given wins."""
    whole = completes(capsys, story, *PROMPT, "--max-new-tokens", 20)
    content = json.loads((story / "generation_config.json").read_text())

    def write(**changes: object) -> None:
        (story / "generation_config.json").write_text(json.dumps({**content, **changes}))

    write(do_sample=True, temperature=1.5, top_k=40, max_new_tokens=20)
    assert completes(capsys, story, *PROMPT, "--seed", 1) != whole
    assert completes(capsys, story, *PROMPT, "--temperature", 0) == whole
    assert completes(capsys, story, *PROMPT, "--top-k", 1) == whole
    write(max_new_tokens=20, stop_strings=[" named"])
    assert completes(capsys, story, *PROMPT) == whole.partition(" named")[0] + "\n"
    write(max_length=12)  # of which the prompt has 8
    short = completes(capsys, story, *PROMPT)
    assert whole.startswith(short.rstrip("\n"))
    assert len(short) < len(whole)
    assert completes(capsys, story, *PROMPT, "--max-new-tokens", 20) == whole
    write(max_length=3)
    assert "says max_length = 3 for prompt and completion together; give --max-new-tokens" in fails(
        capsys, story, *PROMPT
    )
    write(num_beams=4, top_p="most")
    assert "generation_config.json: top_p = 'most'" in fails(capsys, story, *PROMPT)
    write(num_beams=4)
    assert main([str(story), *PROMPT, "--max-new-tokens", "2"]) == 0
    assert "num_beams = 4 is not implemented" in capsys.readouterr().err


@pytest.mark.full
def test_penalties_and_narrowings_reach_the_model(shared, capsys):
    folder = shared / "models/stories260K"
    plain = completes(capsys, folder, *PROMPT, "--max-new-tokens", 40)
    assert completes(capsys, folder, *PROMPT, "--max-new-tokens", 40, "--repetition-penalty", 1.5) != plain
    for narrow in (["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1]):
        assert completes(capsys, folder, *PROMPT, "--max-new-tokens", 40, "--temperature", 1, *narrow) == plain


def test_stop_strings_are_cut_from_every_completion(shared, capsys):
    folder, options = shared / "models/stories260K", ["--prompt", "Tom", "--max-new-tokens", 60]
    whole = completes(capsys, folder, *PROMPT, *options).rstrip("\n").split("\n" + "-" * 60 + "\n")
    stops = [". She", "an"]
    cut = completes(capsys, folder, *PROMPT, *options, "--stop", stops[0], "--stop", stops[1])

    def ended(text: str, prompt: str) -> str:
        places = [place for stop in stops if (place := text.find(stop, len(prompt))) >= 0]
        return text[: min(places)] if places else text

    assert cut.rstrip("\n") == ("\n" + "-" * 60 + "\n").join(
        ended(text, prompt) for text, prompt in zip(whole, ["Once upon a time", "Tom"], strict=True)
    )
    assert cut.rstrip("\n") != ("\n" + "-" * 60 + "\n").join(whole)


def test_an_empty_prompt_begins_a_text_where_the_tokenizer_has_a_beginning(story, capsys):
    assert completes(capsys, story, "--prompt", "", "--max-new-tokens", 20).startswith("Once upon a time")
    tokenizer = json.loads((story / "tokenizer.json").read_text())
    (story / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    config = json.loads((story / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False)
    (story / "tokenizer_config.json").write_text(json.dumps(config))
    assert "a prompt has no token" in fails(capsys, story, "--prompt", "")


def test_the_end_of_the_positions_is_said(shared, capsys):
    assert main([str(shared / "models/stories260K"), "--prompt", "word " * 166, "--max-new-tokens", "600"]) == 0
    said = capsys.readouterr()
    assert "note: ended at the last of the model's 512 positions" in said.err


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def talker(story) -> Path:
    (story / "chat_template.jinja").write_text(TEMPLATE)
    return story


def test_a_conversation_over_a_pipe(talker, capsys, monkeypatch):
    """Each line is answered in the light of those before it."""
    options = [str(talker), "--chat", "--max-new-tokens", "12"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once upon a time\n\n   \n One day, Tom\n"))
    first, second = completes(capsys, *options).splitlines()
    assert first.startswith(", there was a little girl")
    prompt = "Once upon a time" + first
    assert completes(capsys, talker, "--prompt", "Once upon a time", "--max-new-tokens", 12) == prompt + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day, Tom"))
    assert completes(capsys, *options).splitlines() != [second]
    monkeypatch.setattr(sys, "stdin", io.StringIO(" a time"))
    assert completes(capsys, *options, "--system", "Once upon").splitlines() == [first]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert completes(capsys, *options) == ""


def test_a_conversation_that_cannot_be(talker, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 600))
    assert "positions leave no room" in fails(capsys, talker, "--chat")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once \xff\n"), encoding="utf-8"))
    assert "the standard input is not valid UTF-8" in fails(capsys, talker, "--chat")
    (talker / "chat_template.jinja").unlink()
    assert "conversations need a chat template" in fails(capsys, talker, "--chat")
    assert "not allowed with argument" in fails(capsys, talker, "--chat", *PROMPT)
    assert "--prompt --chat is required" in fails(capsys, talker)


def test_a_terminal_is_asked_answered_as_tokens_come_and_left_by_ctrl_d(talker):
    """In a process of its own, with a terminal: Ctrl-C ends a reply and not the conversation."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "jaxllm.generate", str(talker), "--chat", "--max-new-tokens", "480"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    shown, times = "", []

    def until(condition) -> None:
        nonlocal shown
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, shown
            shown += os.read(ours, 64).decode()
            times.append(time.monotonic())

    try:
        until(lambda: shown.endswith("> "))
        os.write(ours, b"Once upon a time\n")
        until(lambda: len(shown) > 120)
        process.send_signal(signal.SIGINT)
        until(lambda: shown.endswith("\n> "))
        assert len(shown) < 1500, "the reply was not ended"
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(ours)
    assert ", there was a little girl" in shown
    assert "Traceback" not in shown
