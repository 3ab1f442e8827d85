"""QLoRA in whole runs: loaded from files, resumed, generated from, merged into the model that it was trained on."""

import json
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import jaxllm
from jaxllm.convert.__main__ import main as convert
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.generate.__main__ import main as generate
from jaxllm.hf import load_params, read_model
from jaxllm.models.quantized import Quantization
from jaxllm.runs.open import open_model
from tests.support.adapters import TOLERANCE
from tests.support.families import mesh_layout
from tests.support.whole_runs import train, workplace

ROOT = Path(__file__).parents[2]
TOKENS = np.random.default_rng(0).integers(3, 500, (2, 12))


@pytest.fixture(scope="module")
def place(tmp_path_factory, shared):
    """A model of 2 layers whose matrices NF4 can store: its config, and what makes a run of it."""
    folder = tmp_path_factory.mktemp("qlora")
    with workplace(folder, shared) as config:
        model = shared / "models/tinystories-656k"
        yield (
            folder,
            config,
            [f"model={{path: {model}, quantize: nf4}}", "data.seq_len=64", "train.batch_size=4"],
            model,
        )


LORA = ["peft.type=lora", "peft.r=4", "peft.lora_alpha=8"]


def as_bitsandbytes_reads_it(model: Path):
    """transformers' model, with the matrices of its layers as they are after NF4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, one in module.named_modules():
            if isinstance(one, torch.nn.Linear) and name != "lm_head":
                codes, state = bnb.quantize_4bit(
                    one.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4"
                )
                one.weight.copy_(bnb.dequantize_4bit(codes, state))
    torch.set_num_threads(threads)
    return module


def test_a_run_resumed_generated_from_and_merged(place, capsys):
    folder, config, base, model = place
    whole, resumed = folder / "whole", folder / "resumed"
    ran = train(config, f"output_dir={whole}", *base, *LORA, "train.steps=8")
    assert ran.status == 0
    assert "stored in nf4 with double quantisation" in ran.said
    on = [f"output_dir={resumed}", *base, *LORA, "train.steps=8", f"checkpoint.resume={whole}/checkpoints/4"]
    assert train(config, *on).status == 0
    ends = [(run / "export/adapter/adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert ends[0] == ends[1]

    opened = open_model(whole, Layout.single())
    ours = np.asarray(jax.jit(opened.lm.logits)(opened.load(), jnp.array(TOKENS)))
    theirs = peft.PeftModel.from_pretrained(as_bitsandbytes_reads_it(model), whole / "export/adapter")
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor(TOKENS)).logits.numpy(), atol=TOLERANCE)

    capsys.readouterr()
    assert generate([str(whole), "--prompt", "Once", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()
    assert convert(["to-hf", str(whole), str(folder / "no")]) == 2
    assert "into which nothing is merged; merge its adapter" in capsys.readouterr().err
    assert convert(["merge", str(model), str(whole), str(folder / "merged")]) == 0
    merged = tree.flatten(jaxllm.load_hf(folder / "merged")[1])
    plain = tree.flatten(jaxllm.load_hf(model)[1])
    assert merged.keys() == plain.keys()
    moved = {path for path in plain if not np.array_equal(merged[path], plain[path])}
    assert moved == {path for path in plain if Quantization.replaces(path)}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_files_are_stored_alike_on_every_mesh(kind, shared):
    quantization, stored = Quantization(kind, double=True), []
    for layout in (Layout.single(), mesh_layout(fsdp=2, tensor=2)):
        lm = read_model(shared / "models/tinystories-656k", layout)
        lm = replace(lm, quantization=quantization)
        params = load_params(lm)
        for leaf, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(lm.abstract()), strict=True):
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (wanted.shape, wanted.dtype, wanted.sharding)
        stored.append(tree.flatten(params))
    assert stored[0].keys() == stored[1].keys()
    for path, leaf in stored[0].items():
        np.testing.assert_array_equal(stored[1][path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "peft.type is full, whose result is the whole model; choose an adapter"),
        (["peft.type=bitfit"], "peft.type is bitfit"),
        (["peft.type=lisa"], "peft.type is lisa"),
        ([*LORA, "model.adapter=[a, b]"], "into which no adapter is merged, and model.adapter has several"),
        ([*LORA, "peft.init_lora_weights=pissa"], "init_lora_weights is pissa.*set init_lora_weights to true"),
        ([*LORA, "peft.modules_to_save=[v_proj]"], "trains layers/attn/v/kernel, which model.quantize stores in nf4"),
        ([*LORA, "model.quantize=fp4"], "must be 'nf4' or 'int8', got 'fp4'"),
        ([*LORA, "model.load_in_4bit=true"], "Did you mean .*model.quantize"),
        ([*LORA, "model.path={small}"], "has rows of 172, which 64 does not divide; set it to int8"),
    ],
)
def test_what_cannot_be_is_one_message(place, shared, options, message):
    folder, config, base, _ = place
    options = [option.replace("{small}", str(shared / "models/stories260K")) for option in options]
    with pytest.raises(UserError, match=message):
        train(config, f"output_dir={folder / 'refused'}", *base, *options)


@pytest.mark.full
def test_a_run_is_no_base(place):
    folder, config, base, model = place
    plain = [f"output_dir={folder / 'plain'}", f"model={{path: {model}}}", *base[1:], "train.steps=2"]
    assert train(config, *plain).status == 0
    with pytest.raises(UserError, match="give the run's export/hf"):
        train(config, f"output_dir={folder / 'x'}", *base, *LORA, f"model.path={folder / 'plain'}")


@pytest.mark.full
@pytest.mark.optimized
@pytest.mark.parametrize("recipe", ["qlora", "dora", "adalora"])
def test_recipes_learn(recipe, shared, tmp_path, capsys):
    """The held-out loss falls by a nat, on real instructions."""
    options = [f"output_dir={tmp_path / 'run'}", f"model.path={shared / 'models/stories3M'}", "train.steps=60"]
    options += [f"data.sources.0.path={shared / 'data/alpaca/alpaca_5k.json'}", "data.seq_len=128"]
    assert train(ROOT / "configs" / f"{recipe}.yaml", *options, "data.eval_fraction=0.01").status == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/held_out/loss"] for line in lines if "eval/held_out/loss" in line]
    with capsys.disabled():
        print(f"{recipe}: held-out loss {held_out[0]:.4f} before, {held_out[-1]:.4f} after")
    assert held_out[-1] < held_out[0] - 1
    assert generate([str(tmp_path / "run"), "--prompt", "### Instruction:", "--max-new-tokens", "4"]) == 0
