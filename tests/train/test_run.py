"""What a whole run leaves behind, against transformers and counts by hand."""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

import jaxllm
from jaxllm.core import tree
from jaxllm.core.config import load
from jaxllm.core.mesh import Layout
from jaxllm.generate.__main__ import main as generate
from jaxllm.runs.config import Config
from jaxllm.runs.open import open_model
from tests.support.tensorboard_events import shown
from tests.support.whole_runs import Ran, stories, sums, train, workplace, write_jsonl

# float32 sums over a few thousand tokens, in another order.
LOSS = 1e-5
GROUPS = ("embed", "attn", "mlp", "norms", "head")


@pytest.fixture(scope="module")
def small_config(tmp_path_factory, shared):
    with workplace(tmp_path_factory.mktemp("runs"), shared) as config:
        yield config


@pytest.fixture(scope="module")
def scratch(small_config) -> Ran:
    """A model from scratch."""
    return train(small_config)


@pytest.fixture(scope="module")
def tuned(small_config, shared) -> Ran:
    """stories260K fine-tuned on one epoch of school maths, with two held-out sets of different formats."""
    folder = small_config.parent
    data = write_jsonl(folder / "sums.jsonl", sums(shared, 10))
    maths = write_jsonl(folder / "maths.jsonl", sums(shared, 5, first=10))
    tales = write_jsonl(folder / "tales.jsonl", [{"text": r["text"][:300]} for r in stories(shared, 6)])
    return train(
        small_config,
        f"output_dir={folder / 'tuned'}",
        f"model={{path: {shared / 'models/stories260K'}}}",
        f"data={{sources: [{{path: {data}, fields: {{prompt: question, completion: answer}}}}], seq_len: 256}}",
        "train={epochs: 1, batch_size: 4}",
        "checkpoint={}",
        f"evals=[{{name: maths, path: {maths}, fields: {{prompt: question, completion: answer}}, every: 100}},"
        f" {{name: tales, path: {tales}, every: 100}}]",
    )


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_holds_what_the_design_says(scratch):
    assert scratch.status == 0
    assert files(scratch.folder) == {
        "SHA256SUMS",
        "config.resolved.yaml",
        "env.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "export",
        "model",
    }
    assert files(scratch.folder / "checkpoints") == {"8", "12", "latest"}  # the newest two
    assert (scratch.folder / "checkpoints/latest").read_text() == "12\n"
    assert files(scratch.folder / "export") == {"hf"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files(scratch.folder / "export/hf")
    environment = json.loads((scratch.folder / "env.json").read_text())
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["attention"] == "xla"
    assert environment["devices"]["count"] == jax.device_count()


def test_the_resolved_config_is_the_config(scratch):
    assert load(scratch.folder / "config.resolved.yaml", [], Config) == scratch.config


def test_metrics_have_each_step_once_and_in_order(scratch):
    lines = scratch.metrics()
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/held_out/loss" in line] == [0, 6, 12]
    told = [line["step"] for line in lines if "ckpt/save_s" not in line]
    assert told == sorted(told)
    saves = [line for line in lines if "ckpt/save_s" in line]
    assert [line["step"] for line in saves] == [4, 8, 12]
    assert all(0 < line["ckpt/blocked_s"] < line["ckpt/save_s"] for line in saves)
    steps = [line for line in lines if "train/loss" in line]
    assert {"perf/compile_s", "mem/planned_gib"} <= steps[0].keys()
    names = {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens",
        "train/trained_tokens",
        "perf/step_time_s",
        "perf/data_wait_s",
        "perf/tokens_per_s",
        "mem/host_peak_gib",
    }
    for line in steps:
        assert names <= line.keys()
        assert all(math.isfinite(line[name]) and line[name] > 0 for name in names)
    groups = {f"train/{norm}/{group}" for norm in ("grad_norm", "param_norm") for group in GROUPS}
    assert [line["step"] for line in steps if groups <= line.keys()] == [10]
    squares = sum(steps[9][f"train/grad_norm/{group}"] ** 2 for group in GROUPS)
    assert math.sqrt(squares) == pytest.approx(steps[9]["train/grad_norm"], rel=1e-6)


def test_tensorboard_shows_the_same_numbers(scratch):
    wanted = {
        (line["step"], name): np.float32(value)
        for line in scratch.metrics()
        for name, value in line.items()
        if name != "step"
    }
    assert shown(scratch.folder / "tensorboard") == wanted


def test_the_learning_rate_is_the_schedule(scratch):
    """Two steps of warm-up, then half a cosine to a tenth one step after the run."""
    logged = [line["train/learning_rate"] for line in scratch.metrics() if "train/loss" in line]
    fall = [0.01 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 11)) / 2) for i in range(11)]
    assert logged == pytest.approx([0.005, *fall], rel=1e-6)


def test_it_learns(scratch):
    held_out = [line["eval/held_out/loss"] for line in scratch.metrics() if "eval/held_out/loss" in line]
    # A new model knows nothing of 512 tokens; it learns which are frequent.
    assert held_out[0] == pytest.approx(math.log(512), abs=0.1)
    assert held_out[-1] < held_out[0] - 0.7


@cache
def transformers_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def tokens_and_trained(folder: Path, record: dict[str, str]) -> tuple[list[int], list[bool]]:
    """A record's ids, by transformers' tokenizer, and which of them are trained."""
    tokenizer = transformers_tokenizer(folder)
    prompt = record.get("question", "")
    encoded = tokenizer(prompt + record.get("answer", record.get("text", "")), return_offsets_mapping=True)
    trained = [end > len(prompt) for _, end in encoded["offset_mapping"]]
    return [*encoded["input_ids"], tokenizer.eos_token_id], [*trained, True]


def reference_loss(folder: Path, records: list[dict[str, str]]) -> float:
    """The mean over all trained tokens, each record alone, by transformers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, count = 0.0, 0
    for record in records:
        ids, trained = tokens_and_trained(folder, record)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        nll = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        mask = torch.tensor(trained[1:])
        total, count = total + float(nll[mask].sum()), count + int(mask.sum())
    return total / count


@pytest.mark.parametrize("name", ["maths", "tales"])
def test_held_out_loss_is_that_of_transformers(tuned, shared, name):
    records = [json.loads(line) for line in (tuned.folder.parent / f"{name}.jsonl").read_text().splitlines()]
    lines = [line for line in tuned.metrics() if f"eval/{name}/loss" in line]
    before, after = lines[0], lines[-1]
    assert (before["step"], after["step"]) == (0, 3)
    for line, model in ((before, shared / "models/stories260K"), (after, tuned.folder / "export/hf")):
        assert line[f"eval/{name}/loss"] == pytest.approx(reference_loss(model, records), abs=LOSS)
        assert line[f"eval/{name}/perplexity"] == pytest.approx(math.exp(line[f"eval/{name}/loss"]), rel=1e-12)
    assert f"{name}: loss {before[f'eval/{name}/loss']:.4f} at step 0" in tuned.said


def test_tokens_are_real_tokens(tuned, shared):
    counted = [tokens_and_trained(shared / "models/stories260K", record) for record in sums(shared, 10)]
    steps = [line for line in tuned.metrics() if "train/loss" in line]
    assert len(steps) == 3  # ten rows of one record each, four in a step
    # A sequence of n ids gives n − 1 pairs of a token and its target.
    assert steps[-1]["train/tokens"] == sum(len(ids) - 1 for ids, _ in counted)
    assert sum(line["train/trained_tokens"] for line in steps) == sum(sum(trained[1:]) for _, trained in counted)


@pytest.mark.parametrize("which", ["scratch", "tuned"])
def test_the_export_computes_the_same_in_transformers(which, request):
    ran: Ran = request.getfixturevalue(which)
    folder = ran.folder / "export/hf"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(3, 512, (2, 40))
    lm, params = jaxllm.load_hf(folder)
    with torch.no_grad():
        wanted = model(torch.tensor(tokens)).logits.numpy()
    assert wanted.std() > 0.1
    np.testing.assert_allclose(lm.logits(params, tokens.astype(np.int32)), wanted, atol=1e-4)
    # What is exported is what was saved.
    saved = tree.flatten(open_model(ran.folder, Layout.single()).load())
    for path, leaf in tree.flatten(params).items():
        assert np.array_equal(leaf, saved[path]), path


@pytest.mark.parametrize("which", ["scratch", "tuned"])
def test_the_export_writes_the_same_text_in_transformers(which, request, capsys):
    ran: Ran = request.getfixturevalue(which)
    folder, prompt = ran.folder / "export/hf", "Once upon a time"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    wanted = tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=20)[0], skip_special_tokens=True)
    assert generate([str(ran.folder), "--prompt", prompt, "--max-new-tokens", "20"]) == 0
    assert capsys.readouterr().out == wanted + "\n"


def test_a_new_model_knows_its_tokenizer(scratch, shared):
    config = transformers.AutoConfig.from_pretrained(scratch.folder / "export/hf")
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id) == (512, 1, 2)
    ours, theirs = (
        transformers.AutoTokenizer.from_pretrained(folder)
        for folder in (scratch.folder / "export/hf", shared / "models/stories260K")
    )
    text = stories(shared, 1)[0]["text"]
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_a_model_goes_on_from_a_run_as_from_its_export(tuned, small_config):
    """The same weights, so the same first evaluation; the export of the export says what the first said."""
    both = [
        train(
            small_config,
            f"output_dir={tuned.folder.parent / name}",
            f"model={{path: {path}}}",
            "train={steps: 2, batch_size: 4}",
            "evals.0.every=100",
        )
        for name, path in (("from-run", tuned.folder), ("from-export", tuned.folder / "export/hf"))
    ]
    first, second = (ran.metrics()[0]["eval/held_out/loss"] for ran in both)
    assert first.hex() == second.hex()
    for name in ("config.json", "generation_config.json"):
        contents = [json.loads((ran.folder / "export/hf" / name).read_text()) for ran in both]
        ids = [
            {key: value for key, value in content.items() if key.endswith("_id") and value is not None}
            for content in contents
        ]
        assert ids[0] == ids[1]
