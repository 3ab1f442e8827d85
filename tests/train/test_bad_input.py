"""Wrong input gives one message that names thing and remedy, exit status 2, and nothing is lost."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.convert.__main__ import main as convert
from jaxllm.generate.__main__ import main as generate
from jaxllm.runs.lock import owned
from jaxllm.train.__main__ import main
from tests.support.whole_runs import Ran, train, workplace, write_jsonl


class Place(NamedTuple):
    """config: of a small run. folder: to write bad input into. shared: real models and data."""

    config: Path
    folder: Path
    shared: Path


@pytest.fixture(scope="module")
def config(tmp_path_factory, shared) -> Iterator[Path]:
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield config


@pytest.fixture(scope="module")
def finished(config) -> Ran:
    """A run of four steps with the checkpoints 2 and 4."""
    return train(config, "train.steps=4", "checkpoint.every=2", "evals.0.every=4")


@pytest.fixture
def place(config, tmp_path, shared) -> Place:
    return Place(config, tmp_path, shared)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capfd, *arguments: str) -> str:
    """Runs the command, which must end with status 2 and one message; returns that message on one line."""
    capfd.readouterr()
    status = main([*map(str, arguments)])
    said = capfd.readouterr()
    assert status == 2, said
    assert said.err.count("error: ") == 1
    assert "Traceback" not in said.out + said.err
    return " ".join(said.err.partition("error: ")[2].split())


# What the config says. The last words of each case are in the message.


def test_misspelt_key(place, capfd):
    path = place.folder / "misspelt.yaml"
    path.write_text(place.config.read_text().replace("learning_rate:", "learning_rat:"))
    line = 1 + path.read_text().splitlines().index("  learning_rat: 0.01")
    said = fails(capfd, path)
    assert f"{path}:{line}: optim.learning_rat" in said
    assert "learning_rate" in said.partition("learning_rat")[2]


CONFIGS = {
    "missing section": (["optim=null"], ["optim"]),
    "missing key": (["evals=[{name: held_out}]"], ["evals.0.every", "required", "steps between"]),
    "steps and epochs": (["train.epochs=1"], ["either steps or epochs"]),
    "batch and micro-batch": (
        ["mesh={data: 2, fsdp: 4}", "train.batch_size=40", "train.micro_batch_size=2"],
        ["train.batch_size 40", "multiple of 16", "train.micro_batch_size 2", "32 or 48"],
    ),
    "float64 that JAX would not take": (
        ["train.param_dtype=float64"],
        ["train.param_dtype is float64", "JAX_ENABLE_X64=1", "train.param_dtype to float32"],
    ),
    "no such data file": (["data.sources.0.path=nowhere.jsonl"], ["no data file matches 'nowhere.jsonl'"]),
    "no such remote file": (
        ["data.sources.0.path=memory://nowhere.jsonl"],
        ["memory://nowhere.jsonl: the server has no such file"],
    ),
    "a remote checkpoint": (
        ["checkpoint.resume=s3://bucket/run/checkpoints/2"],
        ["s3://bucket/run/checkpoints/2 is no checkpoint"],
    ),
    "mesh": (["mesh={fsdp: 3}"], ["fsdp 3", "8 device(s)", "-1"]),
    "tensor axis and heads": (
        ["mesh={tensor: 8, fsdp: 1}"],
        ["4 attention heads", "mesh.tensor = 8", "4"],
    ),
    "rows that do not divide": (
        ["mesh={context: 8, fsdp: 1}", "data.seq_len=100"],
        ["rows of 100 tokens", "the 8 devices", "(context 8)", "set data.seq_len so that they do: to 96 or 104"],
    ),
    "virtual tokens in front of rows that are split": (
        ["mesh={context: 2, fsdp: 4}", "peft={type: prompt_tuning}", "model={path: nowhere}"],
        ["mesh.context is 2", "peft.type is prompt_tuning", "set context to 1"],
    ),
    "held out, and never evaluated": (["evals=[]"], ["data.eval_fraction holds out 0.2", "nothing evaluates it"]),
    "warm-up longer than the run": (["optim.schedule.warmup=13"], ["warmup is 13 steps", "the run has 12"]),
    "attention that cannot be had": (
        ["train.attention=flash"],
        ["train.attention: flash cannot be used here", "needs an NVIDIA GPU", "this is a cpu", "auto"],
    ),
    "no checkpoint": (["checkpoint.resume=somewhere"], ["checkpoint.resume: somewhere is no checkpoint"]),
    "no model": (["model={path: nowhere}"], ["nowhere: there is no such folder"]),
    "a best checkpoint of no set": (
        ["checkpoint.best=eval/heldout/loss"],
        ["checkpoint.best is eval/heldout/loss, which no set of evals gives", "Did you mean 'eval/held_out/loss'?"],
    ),
    "a best checkpoint without its value": (
        ["checkpoint.best=eval/held_out/loss", "checkpoint.every=8"],
        ["evaluated every 6 steps, and checkpoint.every is 8", "set checkpoint.every to 6 or 12"],
    ),
    "a Hub name without network": (
        ["model={path: owner/nothing}"],
        [
            "the Hub model owner/nothing is not in the cache",
            "no file or folder of that name",
            "hf download owner/nothing",
        ],
    ),
    "data by a Hub name without network": (
        ["data.sources.0.path=owner/nothing@v1"],
        ["the Hub dataset owner/nothing@v1", "hf download owner/nothing --repo-type dataset --revision v1"],
    ),
    "no tokenizer": (["model.tokenizer=nowhere"], ["tokenizer folder nowhere does not exist"]),
    "vocabulary too small": (["model.vocab_size=511"], ["up to 511", "511 rows", "model.vocab_size"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_config(case, place, capfd):
    overrides, fragments = CONFIGS[case]
    output = place.folder / "run"
    said = fails(capfd, place.config, f"output_dir={output}", "train.micro_batch_size=1", *overrides)
    for fragment in fragments:
        assert fragment in said
    assert not output.exists()


# What a model's folder holds.


def unknown_architecture(model: Path) -> None:
    edit_json(model / "config.json", architectures=["LamaForCausalLM"])


def unknown_field(model: Path) -> None:
    edit_json(model / "config.json", attention_dropout=0.5)


def truncated(model: Path) -> None:
    file = model / "model-00002-of-00004.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


def missing_file(model: Path) -> None:
    (model / "model-00003-of-00004.safetensors").unlink()


def missing_tensor(model: Path) -> None:
    edit_tensors(model / "model-00004-of-00004.safetensors", lambda tensors: tensors.popitem())


def surplus_tensor(model: Path) -> None:
    edit_tensors(model / "model-00004-of-00004.safetensors", lambda t: t.update(extra=np.zeros(3, np.float32)))


def large_tokenizer(model: Path) -> None:
    edit_json(model / "tokenizer.json", added_tokens=[added(i) for i in (4096, 4097)])


def linked_tokenizer(model: Path) -> None:
    elsewhere = (model / "tokenizer_config.json").rename(model.parent / "elsewhere.json")
    (model / "tokenizer_config.json").symlink_to(elsewhere)


def edit_json(path: Path, **changes: object) -> None:
    before = json.loads(path.read_text())
    if "added_tokens" in changes:
        changes["added_tokens"] = [*before["added_tokens"], *changes["added_tokens"]]  # pyright: ignore
    path.write_text(json.dumps({**before, **changes}))


def edit_tensors(path: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def added(i: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": f"<|{i}|>", "special": True, **flags}


MODELS = {
    unknown_architecture: ["config.json", '"LamaForCausalLM" is not implemented', "LlamaForCausalLM", "Adding a model"],
    unknown_field: ["config.json", "attention_dropout = 0.5"],
    truncated: ["model-00002-of-00004.safetensors", "not a whole safetensors file", "100,000 bytes"],
    missing_file: ["model-00003-of-00004.safetensors", "is missing"],
    missing_tensor: ["model-00004-of-00004.safetensors", "lacks the tensor"],
    surplus_tensor: ["model-00004-of-00004.safetensors", "'extra'"],
    linked_tokenizer: [
        "tokenizer_config.json: is a link out of its folder",
        "elsewhere.json",
        "put a copy of the file",
    ],
    large_tokenizer: ["token ids up to 4,097", "4,096 rows"],
}


@pytest.mark.parametrize("damage", MODELS, ids=lambda damage: damage.__name__)
def test_model(damage, place, capfd):
    model, output = place.folder / "model", place.folder / "run"
    shutil.copytree(place.shared / "models/stories3M", model, ignore=shutil.ignore_patterns("llama2c"))
    for path in (model, *model.iterdir()):
        path.chmod(0o755)
    damage(model)
    said = fails(capfd, place.config, f"model={{path: {model}}}", f"output_dir={output}", "train.micro_batch_size=1")
    for fragment in (str(model), *MODELS[damage]):
        assert fragment in said
    assert not output.exists()


# What the data holds.

RECORD = {"prompt": "two and two", "completion": " is four"}
DATA = {
    "empty": ("", ["is empty", "no record"]),
    "a broken line": (json.dumps(RECORD) + '\n\n{"prompt": "two\n', ["line 3 is not JSON"]),
    "other columns": (json.dumps({"promt": "a", "completion": "b"}), ["line 1", "promt", "Did you mean 'prompt'"]),
    "not UTF-8": ("\udcff", ["is not UTF-8", "offset 0"]),
    "nothing trained": (3 * (json.dumps({**RECORD, "completion": ""}) + "\n"), ["nothing is trained", "none of 3"]),
    "one record, and a share of it held out": (json.dumps(RECORD), ["data.eval_fraction = 0.2 of 1 different"]),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case, place, capfd):
    text, fragments = DATA[case]
    data, output = place.folder / "data.jsonl", place.folder / "run"
    data.write_bytes(text.encode(errors="surrogateescape"))
    said = fails(capfd, place.config, f"data.sources.0.path={data}", f"output_dir={output}", "train.micro_batch_size=1")
    for fragment in (*fragments, *([] if "eval_fraction" in fragments[0] else [str(data)])):
        assert fragment in said
    assert not output.exists()


def test_held_out_rows_that_do_not_divide(place, capfd):
    """They are shorter than any that is trained on."""
    short = write_jsonl(place.folder / "short.jsonl", [{"text": "No."}])
    output, sizes = place.folder / "run", ["mesh={context: 2, fsdp: 4}", "train.micro_batch_size=2"]
    rows = ["data.packing=grouped", "data.seq_len=40", "data.eval_fraction=0"]
    held_out = f"evals=[{{name: short, path: {short}, every: 6}}]"
    said = fails(capfd, place.config, f"output_dir={output}", *sizes, *rows, held_out)
    assert "rows of 5 tokens do not divide over the 2 devices of the mesh (context 2) that share a sequence" in said
    assert "with data.packing grouped to a multiple of 16" in said
    assert not output.exists()


# Folders that are there already. Each case: overrides, and what the message says; nothing in the folder changes.

SAME = ["train.steps=4", "train.micro_batch_size=1"]
OTHER_RUNS = {
    "another seed": (["seed=1"], ["another config: seed (there: 0, now: 1)", "another output_dir"]),
    "another optimizer": (["optim.type=lion"], ["another config: optim.type (there: adamw, now: lion)"]),
    "resume none": (["checkpoint.resume=none"], ["holds a run, and checkpoint.resume is none", "resume=auto"]),
    "fewer steps than done": (["train.steps=3"], ["has done 4 steps", "asks for 3"]),
    "an older checkpoint of itself": (
        ["checkpoint.resume={run}/checkpoints/2"],
        ["has {run}/checkpoints/4, which is newer and whole", "checkpoint.resume=auto"],
    ),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_the_folder_of_another_run(case, place, finished, capfd):
    overrides, fragments = OTHER_RUNS[case]
    before = contents(finished.folder)
    overrides = [override.format(run=finished.folder) for override in overrides]
    said = fails(capfd, place.config, f"output_dir={finished.folder}", *SAME, *overrides)
    for fragment in ("{run}", *fragments):
        assert fragment.format(run=finished.folder) in said
    assert contents(finished.folder) == before


def test_a_folder_that_another_process_is_writing(place, finished, capfd):
    with owned(finished.folder):
        before = contents(finished.folder)
        said = fails(capfd, place.config, f"output_dir={finished.folder}", *SAME)
        assert f"output_dir {finished.folder} is in use by process {os.getpid()} on" in said
        assert contents(finished.folder) == before


def test_a_url_is_no_folder_of_a_run(place, capfd):
    said = fails(capfd, place.config, "output_dir=s3://bucket/run")
    assert "output_dir: s3://bucket/run is a URL, and a run is written to a disk; give a folder" in said


def test_a_folder_that_is_no_run(place, capfd):
    folder = place.folder / "photos"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"jpg")
    said = fails(capfd, place.config, f"output_dir={folder}")
    assert f"{folder} holds 'holiday.jpg' and no config.resolved.yaml" in said
    assert contents(folder) == {"holiday.jpg": b"jpg"}
    said = fails(capfd, place.config, f"output_dir={folder / 'holiday.jpg' / 'run'}")
    assert f"{folder / 'holiday.jpg'} is a file" in said


def test_an_export_folder_with_other_files(place, finished, capfd):
    """It is refused before the training, and not replaced after it."""
    run = shutil.copytree(finished.folder, place.folder / "run")
    (run / "export/hf/notes.txt").write_text("mine")
    before = contents(run)
    said = fails(capfd, place.config, f"output_dir={run}", "train.steps=6", "train.micro_batch_size=1")
    assert "notes.txt" in said
    assert contents(run) == before


def test_data_that_changed_since_the_checkpoint(place, finished, capfd):
    stories = place.config.parent / "stories.jsonl"
    text, before = stories.read_text(), contents(finished.folder)
    try:
        stories.write_text(text.replace("Lily", "Anna"))
        said = fails(capfd, place.config, f"output_dir={finished.folder}", *SAME)
    finally:
        stories.write_text(text)
    assert "what data.sources hold, or the tokenizer, has changed" in said
    assert f"model.path={finished.folder}/checkpoints/4" in said
    assert contents(finished.folder) == before


def test_another_run_s_checkpoint_with_another_model(place, finished, capfd):
    named = f"checkpoint.resume={finished.folder}/checkpoints/4"
    said = fails(capfd, place.config, f"output_dir={place.folder / 'run'}", *SAME, named, "model.hidden_size=64")
    assert "another config: model.hidden_size (there: 32, now: 64)" in said
    assert not (place.folder / "run").exists()


def test_another_run_s_checkpoint_for_a_run_without_any(place, finished, capfd):
    run = shutil.copytree(finished.folder, place.folder / "run")
    shutil.rmtree(run / "checkpoints")
    before, named = contents(run), f"{finished.folder}/checkpoints/4"
    said = fails(capfd, place.config, f"output_dir={run}", *SAME, f"checkpoint.resume={named}")
    assert f"{run} holds a run with another config: checkpoint.resume (there: auto, now: {named})" in said
    assert contents(run) == before


def test_a_damaged_checkpoint(place, finished, capfd):
    """It is named, and so is the command to go on from the one before it; that works, and loses nothing.

    The run has no seal, as one of an older version; it gets one.
    """
    run = shutil.copytree(finished.folder, place.folder / "run")
    (run / "SHA256SUMS").unlink()
    newest, before = run / "checkpoints/4", contents(run)
    written = contents(newest)
    name = max(written, key=lambda name: len(written[name]))
    (newest / name).write_bytes(written[name][::-1])
    damaged = contents(newest)
    command = (place.config, f"output_dir={run}", "train.steps=4", "checkpoint.every=2")
    said = fails(capfd, *command)
    assert f"the checkpoint {newest} is damaged: {name} does not hold" in said
    assert contents(newest) == damaged
    assert generate([str(run), "--prompt", "Once"]) == 2
    assert f"The newest older one that is whole is {run}/checkpoints/2: name it instead" in capfd.readouterr().err

    remedy = re.search(r"checkpoint\.resume=\S+", said)
    assert remedy
    gone_on = train(*command, remedy[0])
    assert f"resuming  from {run}/checkpoints/2, 2 of 4 steps to go" in gone_on.said
    assert f"note      {run} has no SHA256SUMS" in gone_on.said
    assert "changed, and harmless: evals.0.every (there: 4, now: 6)\n" in gone_on.said
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"2", "4", "4.damaged", "latest"}
    assert contents(run / "checkpoints/4.damaged") == damaged
    # The same training: it exports what it exported before.
    assert contents(run / "export") == {name[7:]: data for name, data in before.items() if name[:7] == "export/"}
    # The same command again, as a script would give it, goes on from the newest.
    again = train(*command, remedy[0]).said
    assert f"from {run}/checkpoints/4, 0 of 4 steps to go" in again
    assert "SHA256SUMS" not in again
    (run / "model/tokenizer.json").write_text("{}")
    assert "model/tokenizer.json does not hold what was written" in fails(capfd, *command)


def test_a_damaged_file_of_the_run(place, finished, capfd):
    """It resumes with no other config, and exports no other tokenizer."""
    run = shutil.copytree(finished.folder, place.folder / "run")
    for name in ("config.resolved.yaml", "model/config.json", "model/tokenizer.json", "SHA256SUMS"):
        whole = (run / name).read_bytes()
        (run / name).write_bytes(whole[:-9])
        before = contents(run)
        for command in ([f"output_dir={run}"], [f"output_dir={place.folder / 'new'}", f"model={{path: {run}}}"]):
            said = fails(capfd, place.config, *command, "train.steps=6", "train.micro_batch_size=1")
            assert f"the run {run} is damaged: {name if name != 'SHA256SUMS' else 'its SHA256SUMS'} " in said
        assert contents(run) == before
        (run / name).write_bytes(whole)
    (run / "config.resolved.yaml").unlink()
    said = fails(capfd, place.config, f"output_dir={run}", "train.steps=6")
    assert f"the run {run} is damaged: config.resolved.yaml is missing" in said


# What a run finds out later.


def test_out_of_memory(place, capfd):
    """Some 20 TB are refused when the step is compiled: nothing is allocated, nothing written."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    output = place.folder / "run"
    huge = ["hidden_size=262144", "intermediate_size=1048576", "num_hidden_layers=1", "head_dim=64"]
    said = fails(
        capfd,
        place.config,
        f"output_dir={output}",
        *(f"model.{size}" for size in huge),
        "data.seq_len=16",
        "train.micro_batch_size=1",
    )
    asked, parts, there = re.findall(r"(?:needs|\() ?([\d,.]+)(?: GiB| parameters)|and ([\d.]+) GiB are there", said)
    assert float(asked[0]) > float(parts[0]) > 1000
    assert 0 < float(there[1]) < 1000
    *helps, others = said.partition("may help: ")[2].split("; ")
    assert helps
    assert all(re.match(r"(train|optim|data)\.\w+: ", remedy) for remedy in helps)
    assert "mesh.fsdp" in others
    assert "jaxllm.plan" in others
    assert not output.exists()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20  # KiB: less than 1 GiB


def test_losses_that_are_not_finite(place, capfd):
    output = place.folder / "run"
    bad = ["optim.learning_rate=1e30", "optim.schedule={type: constant, warmup: 0}", "train.max_grad_norm=null"]
    said = fails(capfd, place.config, f"output_dir={output}", *bad, "train.micro_batch_size=1", "checkpoint.every=1")
    assert "3 steps in a row up to step 4" in said
    assert "optim.learning_rate" in said
    # The first step's update was finite; it is there.
    assert (output / "checkpoints/latest").read_text() == "3\n"
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert [line.get("train/bad_steps_in_a_row") for line in steps] == [None, 1, 2, 3]


def model_with(place, name: str, value: float) -> Path:
    """A small model whose tensor `name` has `value` everywhere."""
    model = place.folder / "model"
    shutil.copytree(place.shared / "models/stories260K", model, ignore=shutil.ignore_patterns("llama2c"))
    for path in (model, *model.iterdir()):
        path.chmod(0o755)
    edit_tensors(model / "model.safetensors", lambda tensors: tensors[name].fill(value))
    return model


def test_a_run_of_which_no_step_was_applied(place, capfd):
    """Each step names its records, a few of many; the run fails, and so does the same command with no step to go."""
    model, run = model_with(place, "model.norm.weight", 1e18), place.folder / "run"
    data = write_jsonl(place.folder / "many.jsonl", [RECORD] * 120)
    command = [
        str(place.config),
        f"output_dir={run}",
        f"model={{path: {model}}}",
        f"data={{sources: [{{path: {data}}}], seq_len: 64}}",
        "train={steps: 2, batch_size: 24, max_bad_steps: 3}",
        "evals=[]",
    ]
    status, said = main(command), capfd.readouterr()
    assert status == 2
    assert f"{run}: none of the 2 steps was applied" in said.err
    bad = [line for line in said.out.splitlines() if re.search("not applied: loss .*, gradient norm (inf|nan)", line)]
    assert [line.split()[1] for line in bad] == ["1", "2"]
    assert bad[0].count(f"{data}, line ") == 50
    assert bad[0].endswith(" more")
    assert "none of the earlier steps was applied" in fails(capfd, *command)
    assert (run / "checkpoints/latest").read_text() == "2\n"
    assert not (run / "export").exists()


def test_weights_of_infinite_norm_are_refused(place, capfd):
    """By training, generation and conversion: what they make is normalised to 0, so that the loss is finite."""
    model, run = model_with(place, "model.embed_tokens.weight", 3e38), place.folder / "run"
    few = ("train={steps: 2, batch_size: 8}", "evals=[]", "data.eval_fraction=0")
    said = fails(capfd, place.config, f"output_dir={run}", f"model={{path: {model}}}", *few)
    assert f"{model}: the weights are not finite: embed/table has numbers that are NaN, infinite or so large" in said
    assert not run.exists()
    assert generate([str(model), "--prompt", "Once"]) == 2
    assert f"{model}: the weights are not finite: embed/table" in capfd.readouterr().err
    assert convert(["to-hf", str(model), str(place.folder / "hf")]) == 2
    assert "hf: not written: embed/table" in capfd.readouterr().err
    assert not (place.folder / "hf").exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: what is written beyond `size` bytes of a file is refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk(place, finished, capfd):
    run = shutil.copytree(finished.folder, place.folder / "run")
    with files_of_at_most(20_000):
        said = fails(capfd, place.config, f"output_dir={run}", *SAME, "train.steps=6", "evals.0.every=4")
    assert f"writing a checkpoint to {run / 'checkpoints'} failed: File too large. Free some space" in said
    before, after = contents(finished.folder / "checkpoints"), contents(run / "checkpoints")
    assert {name: after[name] for name in before} == before
    assert contents(run / "export") == contents(finished.folder / "export")
