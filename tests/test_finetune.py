"""Fine-tuning a real pretrained model on real instructions, shortened: it learns, and what it learned comes out."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import jaxllm
from jaxllm.generate.__main__ import main as generate
from tests.support.whole_runs import train

ROOT = Path(__file__).parents[1]
SHORT = ["train.steps=100", "data.seq_len=128", "data.eval_fraction=0.01"]
GSM8K_FIELDS = "data.sources.0.fields={instruction: question, output: answer}"


@pytest.mark.full
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("data", "options", "fall"),
    [
        ("alpaca/alpaca_5k.json", [], 1.0),
        ("gsm8k/train.jsonl", [GSM8K_FIELDS], 3.0),
    ],
    ids=["alpaca", "gsm8k"],
)
def test_finetuning(
    data: str, options: list[str], fall: float, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The held-out loss falls by at least `fall` nats; transformers computes the same with the export."""
    paths = [f"output_dir={tmp_path / 'run'}", f"model.path={shared / 'models' / 'stories3M'}"]
    records = f"data.sources.0.path={shared / 'data' / data}"
    ran = train(ROOT / "configs" / "finetune.yaml", *paths, records, *options, *SHORT)
    assert ran.status == 0

    run, lines = ran.folder, ran.metrics()
    held_out = [line["eval/held_out/loss"] for line in lines if "eval/held_out/loss" in line]
    with capsys.disabled():
        print(f"{data}: held-out loss {held_out[0]:.4f} before, {held_out[-1]:.4f} after")
    assert held_out[-1] < held_out[0] - fall

    export = run / "export" / "hf"
    tokenizer = AutoTokenizer.from_pretrained(export)
    theirs = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    prompt = "### Instruction:\nName a color of the sky.\n\n### Response:\n"
    ids = tokenizer(prompt)["input_ids"]
    lm, params = jaxllm.load_hf(export)
    ours = np.asarray(lm.logits(params, jnp.asarray([ids])))
    with torch.no_grad():
        np.testing.assert_allclose(ours, theirs(torch.tensor([ids])).logits.numpy(), atol=1e-4)
        greedy = theirs.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False)[0]
    for model in (run, export):
        assert generate([str(model), "--prompt", prompt, "--max-new-tokens", "30"]) == 0
        assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(greedy, skip_special_tokens=True).rstrip("\n")
