"""The comparison of methods: one table, one figure, and a plan of each method for a larger model."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "scripts" / "bench"
SMALL = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)


@pytest.mark.full
def test_the_comparison(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCH))
    import methods

    monkeypatch.setattr(methods, "LLAMA_8B", SMALL)
    monkeypatch.setattr(methods, "missing_wheels", lambda: ["jax-cuda12-plugin"])
    result = tmp_path / "three.json"
    model = shared / "models" / "stories260K"
    data = shared / "data" / "alpaca_gpt4" / "alpaca_en_demo.json"
    how = ["--steps", "2", "--results", result, "data.seq_len=64"]
    asked = ["methods.py", model, data, "--methods", "full", "lisa, 2 layers", "bitfit", *how]
    monkeypatch.setattr(sys, "argv", [str(one) for one in asked])
    methods.main()
    runs = json.loads(result.read_text())["methods"]
    full, lisa, bitfit = (runs[name] for name in ("full", "lisa, 2 layers", "bitfit"))
    # Of 5 layers 2 train, with the embedding, which is tied, and the last norm; a bias for each output of a matrix.
    assert full["trained"] == 260_032
    assert lisa["trained"] == 260_032 - 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 172 + 2 * 64)
    assert bitfit["trained"] == 5 * (3 * 64 + 2 * 32 + 2 * 172)
    assert [run["held_out_loss"]["before"] for run in (lisa, bitfit)] == pytest.approx(
        [full["held_out_loss"]["before"]] * 2, rel=1e-5
    )
    for run in (full, lisa, bitfit):
        # Two moments of what trains, and optax's counters.
        assert 0 <= run["8B"]["parts"]["optimizer state"] - 8 * run["8B"]["trained"] <= 64
    table = capsys.readouterr().out
    assert "| full | 260,032 |" in table
    assert "<svg" in result.with_suffix(".svg").read_text()


def test_every_recipe_of_a_method_is_compared(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import methods

    compared = {run.recipe.stem for run in methods.METHODS.values()}
    assert compared >= {"adamw", "lora", "qlora", "dora", "lisa", "prompt_tuning"}
    assert all(run.recipe.is_file() for run in methods.METHODS.values())
