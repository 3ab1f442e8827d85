#!/usr/bin/env python3
"""Compares methods of fine-tuning: each trains the same model on the same tokens, and is planned for an 8B Llama.

    python scripts/bench/methods.py MODEL alpaca.json                  every method; a table and a figure
    python scripts/bench/methods.py MODEL alpaca.json --methods full lisa-2 --steps 500
    python scripts/bench/methods.py MODEL alpaca.json train.remat=dots      values of the config, for all

Runs follow one another, so that none takes time from another; all compute the layers again in the backward pass, as
LISA always does. Planned is what one H100 would hold: an 8B Llama in bfloat16 with AdamW at 1 × 2048; and what the
paper of LISA says of 7B and 70B. Needs the extras [test] and [plan].
"""

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from compare import CONFIGS, Run, markdown, overrides_of, parser_of, write

import jaxllm
from jaxllm.core import tree
from jaxllm.core.config import load
from jaxllm.core.mesh import Layout
from jaxllm.files.hub import model_folder
from jaxllm.models import LM
from jaxllm.plan.plan import Plan, devices_for, plan
from jaxllm.plan.targets import missing_wheels, target_named
from jaxllm.processes.environment import quiet_libraries
from jaxllm.runs.config import Config
from jaxllm.train.model import model_without_weights

jax.config.update("jax_platforms", "cpu")  # of this process: the runs take what there is

RESULTS = Path(__file__).parent / "results" / "methods.json"
FULL = CONFIGS / "optimizers" / "adamw.yaml"
LORA, LISA = CONFIGS / "lora.yaml", CONFIGS / "lisa.yaml"
REMAT = "train.remat=full"
METHODS = {
    "full": Run(FULL, [REMAT]),
    "lora, r 16": Run(LORA, [REMAT]),
    "lora, r 128": Run(LORA, [REMAT, "peft.r=128", "peft.lora_alpha=128", "optim.learning_rate=5e-4"]),
    "dora, r 16": Run(CONFIGS / "dora.yaml", [REMAT]),
    "qlora, r 16": Run(CONFIGS / "qlora.yaml", [REMAT]),
    "lisa, 2 layers": Run(LISA),
    "lisa, 4 layers": Run(LISA, ["peft.active_layers=4"]),
    "bitfit": Run(FULL, [REMAT, "peft={type: bitfit}", "optim.learning_rate=2e-3", "optim.weight_decay=0"]),
    "prompt tuning": Run(CONFIGS / "prompt_tuning.yaml", [REMAT]),
}
COLUMNS = ("method", "trains", "loss after", "step of full's", "planned MiB", "8B trains", "8B planned GiB")

LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096}
LLAMA_8B = dict(
    **dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32),
    **dict(num_attention_heads=32, num_key_value_heads=8),
)
# Those of the paper: Llama 2.
LLAMA_7B = dict(
    **dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32),
    **dict(num_attention_heads=32, num_key_value_heads=32),
)
LLAMA_70B = dict(
    **dict(vocab_size=32000, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80),
    **dict(num_attention_heads=64, num_key_value_heads=8),
)
PLANNED = ["data.seq_len=2048", "train.batch_size=1", "train.param_dtype=bfloat16"]
LAYERS_ALONE = ["peft.train_embed=false", "peft.train_norm=false", "peft.train_head=false"]
CLAIMS = {
    "7B, 2 layers, 1 × 1024, one GPU": (LLAMA_7B, ["data.seq_len=1024"]),
    "70B, 4 layers, 1 × 1024 a GPU, fsdp 4": (
        LLAMA_70B,
        ["peft.active_layers=4", "data.seq_len=1024", "mesh.fsdp=4", "train.batch_size=4"],
    ),
}


def biased(model: str, folder: Path) -> Path:
    """A copy of the model, in `folder`, with biases of zero, which BitFit trains."""
    lm, params = jaxllm.load_hf(model)
    config = lm.config.model_copy(update={"attention_bias": True, "mlp_bias": True})
    more = LM(lm.family, config, lm.layout, lm.param_dtype, lm.compute_dtype)
    there = tree.flatten(params)
    leaves = {path: there.get(path, jnp.zeros(leaf.shape)) for path, leaf in tree.flatten(more.abstract()).items()}
    jaxllm.save_hf(more, tree.insert({}, leaves), folder)
    for file in model_folder(model, "tokenizer").glob("*token*"):
        shutil.copy(file, folder)
    return folder


def planned(run: Run, model: Mapping[str, Any], changes: Sequence[str] = ()) -> Plan:
    """The plan of the run with a model of that shape, for H100s."""
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        biases = any("bitfit" in change for change in run.changes)
        shape = {**LLAMA, **model, "attention_bias": biases, "mlp_bias": biases}
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        where = [f"model.path={folder}", "data.sources.0.path=nowhere", "output_dir=nowhere"]
        config = load(run.recipe, [*where, *PLANNED, *run.changes, *changes], Config)
        target = None if missing_wheels() else target_named("h100")
        return plan(config, devices_for(config.mesh, target, None))


def trained(run: Run, overrides: Sequence[str]) -> int:
    """How many parameters train at a time."""
    config = load(run.recipe, [*overrides, *run.changes, "output_dir=nowhere"], Config)
    return config.peft.trained_at_a_time(model_without_weights(config, Layout.single()))


def of_plan(made: Plan) -> dict[str, Any]:
    """What is kept of a plan, in bytes on each device."""
    method = made.program.config.peft
    return {
        "trained": method.trained_at_a_time(made.program.lm),
        "device": made.lm.layout.mesh.devices.flat[0].device_kind,
        "peak_bytes": made.compiled.peak_bytes,
        "parts": dict(made.parts),
    }


def claims() -> dict[str, dict[str, Any]]:
    """The plans of what the paper says of LISA, with embedding, last norm and head trained and frozen."""
    made = {}
    for name, (model, changes) in CLAIMS.items():
        for which, more in (("all trained", []), ("layers alone", LAYERS_ALONE)):
            made[f"{name}, {which}"] = of_plan(planned(Run(LISA), model, [*changes, *more]))
    return made


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The results as a Markdown table."""
    rows: list[Sequence[str]] = [COLUMNS]
    full = results["full"]["step_s"]["median"] if "full" in results else math.nan
    for name, result in results.items():
        rows.append(
            (
                name,
                f"{result['trained']:,}",
                f"{result['held_out_loss']['after']:.3f}",
                f"{result['step_s']['median'] / full:.2f}",
                f"{result['planned_bytes'] / 2**20:,.1f}",
                f"{result['8B']['trained'] / 1e6:,.1f}M",
                f"{result['8B']['peak_bytes'] / 2**30:,.2f}",
            )
        )
    return markdown(rows)


def main() -> None:
    """The command."""
    parser = parser_of("methods", list(METHODS), __doc__, RESULTS)
    parser.add_argument("--claims", action="store_true", help="plan what the paper of LISA says too, some minutes")
    asked = parser.parse_intermixed_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.methods:
            run = METHODS[name]
            overrides = overrides_of(asked)
            if name == "bitfit":
                overrides.append(f"model.path={biased(asked.model, Path(folder) / 'biased')}")
            plan_8b = of_plan(planned(run, LLAMA_8B))
            results[name] = {"trained": trained(run, overrides), **run.measured(overrides), "8B": plan_8b}
            print(f"{name}: {results[name]['held_out_loss']['after']:.4f}", file=sys.stderr)
    paper = claims() if asked.claims else {}
    write(asked, results, methods=results, claims=paper)
    print(table(results))
    rows = [(name, f"{claim['peak_bytes'] / 2**30:,.2f}") for name, claim in paper.items()]
    print(markdown([("LISA, as its paper has it", "planned GiB a GPU"), *rows]) if rows else "")


if __name__ == "__main__":
    main()
