"""`python -m jaxllm.plan`: it says of a run what the run says of itself, before anything is there but its config."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from jaxllm.core.config import load
from jaxllm.core.hardware import TARGETS
from jaxllm.plan.__main__ import main
from jaxllm.plan.plan import devices_for, plan
from jaxllm.plan.report import verdict
from jaxllm.plan.targets import target_named
from jaxllm.runs.config import Config
from tests.support.gpu_plans import HEADS, LLAMA_1B, LLAMA_8B, config_of, gpu_plans, needs_compiler
from tests.support.whole_runs import train, workplace

GIB, MIB = 2**30, 2**20
ROOT = Path(__file__).parents[2]
TINY = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return config_of(tmp_path, TINY, param_dtype="float32")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where CUDA's compiler is not installed."""
    monkeypatch.setattr("jaxllm.plan.__main__.missing_wheels", lambda: ["jax-cuda12-plugin"])


@pytest.mark.parametrize(
    "how", [["train.update=fused"], ["train.remat=full", "mesh.tensor=2"]], ids=["fused", "tensor"]
)
def test_it_plans_the_step_that_runs(tmp_path, shared, how):
    """On the same devices the plan, which has no data, says what the run says of its own program."""
    with workplace(tmp_path, shared) as path:
        changes = [*how, "train.steps=2", "checkpoint.every=null"]
        ran = train(path, *changes, devices=2)
        without_data = load(path, [*changes, "data.sources.0.path=nowhere"], Config)
        planned = plan(without_data, jax.devices()[:2])
    assert planned.compiled.peak_bytes == ran.metrics()[1]["mem/planned_gib"] * GIB
    assert sum(planned.parts.values()) == planned.compiled.peak_bytes


def test_the_parts_are_what_they_are_called(tiny):
    """AdamW in float32, on one device and sharded over four."""
    changes = ["optim.type=adamw", "train.batch_size=4"]
    one = plan(load(tiny, changes, Config), jax.devices()[:1])
    count = one.program.lm.parameter_count()
    assert one.parts["parameters"] == 4 * count
    # Two moments, and optax's counters of 4 bytes.
    assert 0 <= one.parts["optimizer state"] - 8 * count <= 16
    # Five arrays of a batch, and the state's step.
    assert one.parts["batch and counters"] == 5 * 4 * 2048 * 4 + 4
    assert one.compiled.in_place_bytes >= 12 * count
    assert one.parts["results that are not written in place"] < 1024
    four = plan(load(tiny, changes, Config), jax.devices()[:4])
    # All but the norms is split.
    norms = 4 * 5 * 32
    assert four.parts["parameters"] == (4 * count - norms) / 4 + norms


def test_what_is_frozen_has_no_optimizer_state(tiny):
    changes = ["optim.type=adamw", "peft={type: freeze, train: ['layers/attn/q/*']}"]
    planned = plan(load(tiny, changes, Config), jax.devices()[:1])
    assert planned.parts["parameters"] == 4 * planned.lm.parameter_count()
    assert 0 <= planned.parts["optimizer state"] - 8 * 2 * 32 * 32 <= 16


def test_what_it_prints_without_the_compiler_of_cuda(tiny, on_cpu, capsys):
    assert main([str(tiny), "--gpu", "h200", "optim.type=adalomo", "--devices", "2", "train.batch_size=2"]) == 0
    said = capsys.readouterr().out
    lines = {line.split(" ")[0]: line for line in said.splitlines()}
    assert "simulated CPU devices, not for NVIDIA H200: jax-cuda12-plugin not installed" in said
    assert "jaxllm[plan]" in said
    assert "2 × cpu: pipeline 1 × data 1 × fsdp 2 × context 1 × tensor 1" in lines["devices"]
    assert "adalomo, fused update, 1 × 2 sequences of 2048 tokens" in lines["step"]
    assert "nothing was run" in lines["compiled"]
    assert "unknown" in lines["fits"]
    assert "exact" not in said
    for part in ("parameters", "optimizer state", "batch and counters", "temporaries", "peak"):
        assert part in said
    assert not (tiny.parent / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "h10"], "--gpu h10: no such GPU is described. Did you mean 'h100'? Known: h100, h200, a100"),
        (["--devices", "0"], "--devices must be at least 1, got 0"),
        (["--devices", "9"], "--devices 9: this process has 8 simulated CPU devices"),
        (["--devices", "3", "mesh.fsdp=2"], "does not fit the 3 device(s) here: the sizes must multiply to 3"),
        (["mesh.tensor=3"], "4 attention heads of the model do not divide over mesh.tensor = 3"),
        (["mesh.data=2"], "train.batch_size 1 is not a multiple of 2"),
        (["optim.type=adalom"], "'adalomo'"),
        (["train.attention=flash"], "train.attention: flash cannot be used here"),
        (["train.compute_dtype=float64"], "train.compute_dtype is float64, which JAX has only where it is asked for"),
        (["model.vocab_size=null"], "the tokenizer folder nowhere does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message(tiny, on_cpu, capsys, arguments, message):
    assert main([str(tiny), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_as_many_devices_as_the_mesh_names(tiny):
    def count(*changes: str) -> int:
        return len(devices_for(load(tiny, changes, Config).mesh, None, None))

    assert count() == 1
    assert count("mesh.tensor=2") == 2
    assert count("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2") == 8


def test_whether_it_fits(tiny):
    """A run takes 92 % of a card; a CPU's program tells only when the state alone is too much."""
    config = load(tiny, [], Config)
    planned = plan(config, jax.devices()[:1])
    h100 = target_named("h100")
    limit = 0.92 * h100.memory_bytes

    def fits(argument: float, peak: float, platform: str) -> str:
        class Lm:
            layout = type("Layout", (), {"platform": platform})

        compiled = replace(planned.compiled, argument_bytes=int(argument), peak_bytes=int(peak))
        program = replace(planned.program, lm=Lm)
        return verdict(replace(planned, compiled=compiled, program=program), h100)[0]

    assert fits(10 * GIB, limit - MIB, "gpu") == "yes"
    assert fits(10 * GIB, limit + MIB, "gpu") == "no"
    assert fits(10 * GIB, limit + MIB, "cpu") == "unknown"
    assert fits(limit + MIB, limit + MIB, "cpu") == "no"


def test_whether_it_fits_with_the_optimizer_on_the_host(tiny):
    """Devices that are not here have no host: its state is counted, and may be what does not fit."""
    ordinary = ("optim.type=adamw", "train.update=ordinary", "train.offload_optimizer=true")
    planned = plan(load(tiny, ordinary, Config), jax.devices()[:1])
    h100 = target_named("h100")
    limit, waits = int(0.92 * h100.memory_bytes), planned.parts["optimizer state"]

    def fits(peak: int, platform: str) -> str:
        class Lm:
            layout = type("Layout", (), {"platform": platform})

        compiled = replace(planned.compiled, argument_bytes=peak, peak_bytes=peak)
        program = replace(planned.program, lm=Lm)
        return verdict(replace(planned, compiled=compiled, program=program), h100)[0]

    assert fits(limit, "gpu") == "yes"
    assert fits(limit + waits, "gpu") == "unknown"
    assert fits(limit + waits + MIB, "gpu") == "no"
    assert fits(limit + waits, "cpu") == "unknown"
    assert fits(limit + waits + MIB, "cpu") == "no"


def test_help_names_every_gpu(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in TARGETS)
    assert "jaxllm[plan]" in said


@needs_compiler
def test_the_command_plans_for_a_gpu_that_is_not_here(tmp_path):
    """In bfloat16 with the flash kernel, as a run there would; and says nothing else."""
    config = config_of(tmp_path, TINY | dict(head_dim=16), micro_batch_size=1, batch_size=8)
    command = [sys.executable, "-m", "jaxllm.plan", str(config), "--gpu", "a100", "mesh.fsdp=2", "mesh.tensor=2"]
    environment = {**os.environ, "COLUMNS": "200", "JAX_PLATFORMS": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "card      NVIDIA A100-SXM4-80GB" in done.stdout
    assert "4 × NVIDIA A100-SXM4-80GB: pipeline 1 × data 1 × fsdp 2 × context 1 × tensor 2" in done.stdout
    assert "computing in bfloat16" in done.stdout
    assert "attention flash" in done.stdout
    assert "4 × 2 sequences of 2048 tokens" in done.stdout
    assert "fits      yes" in done.stdout


@needs_compiler
def test_lengths_for_which_xla_has_no_tiling(tmp_path, shared):
    """36 tokens, 4 of them virtual: where XLA breaks off, as it does without a card to try on, cuBLAS multiplies."""
    config = config_of(tmp_path, {}, update="ordinary", param_dtype="float32")
    prompt = ["peft.type=prompt_tuning", "peft.num_virtual_tokens=4", "optim.type=adamw"]
    model = f"model={{path: {shared / 'models' / 'stories260K'}}}"
    (planned,) = gpu_plans(config, [model, *prompt, "data.seq_len=32", "train.batch_size=2"])
    moments = 2 * 4 * 64 * 4  # two of 4 virtual tokens of width 64, in float32
    assert moments <= planned.parts["optimizer state"] <= moments + 64


@pytest.mark.full
@needs_compiler
def test_8b_in_the_memory_of_its_weights(tmp_path):
    """Llama 3 8B at 1 × 2048 on one H100: 15.0 GiB of weights, and less than 5 besides."""
    config = config_of(tmp_path, LLAMA_8B | HEADS["8B"])
    unclipped, clipped = "train.max_grad_norm=null", "train.max_grad_norm=1.0"
    plans = gpu_plans(config, [unclipped], [unclipped, "optim.type=adalomo"], [clipped])
    for one in plans:
        assert one.attention == "flash"
        assert one.in_place >= one.parts["parameters"] + one.parts["optimizer state"]
        assert one.peak <= 20 * GIB, one


@pytest.mark.full
@needs_compiler
def test_sharded_over_8_one_layer_is_whole_at_a_time(tmp_path):
    """Llama 3 8B with a row of 2048 on each of 8 H100s: beside its eighth of the weights, a card has room for the
    inputs of the 32 layers and what the last one gives, and for three whole layers."""
    config = config_of(tmp_path, LLAMA_8B | HEADS["8B"], max_grad_norm=None, batch_size=8)
    (sharded,) = gpu_plans(config, ["mesh.fsdp=8"])
    width, depth = LLAMA_8B["hidden_size"], LLAMA_8B["num_hidden_layers"]
    vocabulary = 2 * LLAMA_8B["vocab_size"] * width
    layers = 8 * sharded.parts["parameters"] - 2 * vocabulary
    assert sharded.temp <= (depth + 1) * 2048 * width * 2 + 3 * layers / depth


@pytest.mark.full
@needs_compiler
def test_a_fused_update_saves_the_gradients_of_the_layers(tmp_path):
    """AdamW of a 1B model; the embedding's and the head's gradients are whole in both."""
    config = config_of(tmp_path, LLAMA_1B | HEADS["1B"])
    common = ["optim.type=adamw", "data.seq_len=256", "train.max_grad_norm=null"]
    fused, ordinary = gpu_plans(config, common, [*common, "train.update=ordinary", "train.remat=full"])
    assert fused.argument == ordinary.argument
    vocabulary = 2 * LLAMA_1B["vocab_size"] * LLAMA_1B["hidden_size"]
    layers = fused.parts["parameters"] - 2 * vocabulary  # in bfloat16, as their gradients
    assert 0.95 * layers <= ordinary.temp - fused.temp <= 1.15 * layers


@pytest.mark.full
@needs_compiler
def test_fused_stages_have_the_gradients_of_one_layer(tmp_path):
    """A 1B model in four stages of four layers: their moments are not copied, and of their gradients three are saved,
    for what is kept of eight micro-batches instead of seven."""
    config = config_of(tmp_path, LLAMA_1B | HEADS["1B"], batch_size=8, micro_batch_size=1, max_grad_norm=None)
    common = ["mesh.pipeline=4", "mesh.fsdp=1"]
    adamw = [*common, "optim.type=adamw"]
    lomo, fused, ordinary = gpu_plans(config, common, adamw, [*adamw, "train.update=ordinary"])
    vocabulary = 2 * 2 * LLAMA_1B["vocab_size"] * LLAMA_1B["hidden_size"] / 4
    layer = (fused.parts["parameters"] - vocabulary) / 4
    kept = 2 * 2048 * LLAMA_1B["hidden_size"]
    assert fused.temp <= lomo.temp + layer
    # The ordinary step sums in float32.
    assert ordinary.temp - fused.temp >= 2 * 3 * layer - (4 + 3) * kept


@pytest.mark.tables
@needs_compiler
def test_the_readme_says_what_each_mesh_takes():
    """Its command, with the last three settings of each row of the table under it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^python -m jaxllm\.plan (.* mesh=.*)$", text, re.MULTILINE)
    config, *arguments = shlex.split(line)
    fixed = [word for word in arguments if "=" in word][:-3]
    names = [word.partition("=")[0] for word in arguments[-3:]]
    cells = re.findall(r"^\| (\d+) \| (\d+) \| `(\{.*\})` \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    assert len(cells) == 6
    rows = [[*fixed, *map("{}={}".format, names, row[:3])] for row in cells]
    for row, one in zip(cells, gpu_plans(ROOT / config, *rows), strict=True):
        assert [one.temp / GIB, one.peak / GIB] == pytest.approx([float(gib) for gib in row[3:]], rel=0.02), row


@pytest.mark.full
@needs_compiler
def test_bytes_per_parameter(tmp_path):
    """Of a 7B model: 4 of weights, 8 of moments and 4 of gradients in mixed precision, 2, 8 and 2 in bfloat16."""
    script = ROOT / "scripts" / "bench" / "optimizer_memory.py"
    results = tmp_path / "results.json"
    command = [sys.executable, script, "adamw", "lomo", "adalomo", "--results", results]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(results.read_text())
    peaks = {(row["optimizer"], row["form"]): row["peak"] for row in report["bytes_per_parameter"]}
    assert peaks["adamw", "float32"] == pytest.approx(16, abs=0.1)
    assert peaks["adamw", "bfloat16"] == pytest.approx(12, abs=0.1)
    assert peaks["adamw", "bfloat16, fused"] < 10.2  # without the gradients of all layers but one
    assert 2 <= peaks["lomo", "bfloat16, fused"] <= 2.1
    assert 2 <= peaks["adalomo", "bfloat16, fused"] <= 2.1
    assert "| lomo | bfloat16, fused | 2.00 | 0.00 |" in done.stdout
    assert {"jax", "jaxlib"} <= report["packages"].keys()
    assert report["commit"]
