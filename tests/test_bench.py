"""The benchmark runs, its record says what was measured, and both engines did the same work."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCH / "train.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.full
def test_a_tiny_benchmark(tmp_path):
    done = bench("tiny", "--blocks", 2, "--block-s", 0.1, "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("tiny-*.json")
    result = json.loads(file.read_text())
    assert {"device", "commit", "date", "python", "packages", "parameters", "peak_flops", "text"} <= set(result)
    assert {"jax", "torch", "transformers"} <= set(result["packages"])
    assert result["engines"].keys() == {"jaxllm", "torch"}
    for name, engine in result["engines"].items():
        assert 0 < engine["step_s"]["q25"] <= engine["step_s"]["median"] <= engine["step_s"]["q75"]
        assert engine["tokens_per_s"] == pytest.approx(4 * 64 / engine["step_s"]["median"])
        assert engine["peak_bytes"] > 2**26
        assert 0 < engine["mfu_useful"] < engine["mfu"]
        assert len(engine["losses"]) == 20
        assert engine["losses"][-1] < engine["losses"][0]
        assert f"| tiny | {result['device']} | {name} |" in done.stdout
    ours, theirs = (result["engines"][name]["losses"] for name in ("jaxllm", "torch"))
    assert ours == pytest.approx(theirs, rel=result["loss_tolerance"])
    assert result["engines"]["jaxllm"]["compile_s"] > 0
    assert result["engines"]["torch"]["speed_of_torch"]["median"] == 1


def test_speed_is_compared_block_by_block(monkeypatch):
    """When the machine slows down, both engines do, and their ratio stays."""
    monkeypatch.syspath_prepend(str(BENCH))
    from summary import largest_difference, ratios, spread

    ours, theirs = [[1.0, 1.0], [4.0, 4.0, 4.0], [1.0, 1.0]], [[2.0, 2.0], [8.0, 8.0], [2.0, 2.0]]
    assert ratios(ours, theirs) == {"median": 2.0, "q25": 2.0, "q75": 2.0}
    assert spread([1.0, 2.0, 3.0, 4.0, 100.0]) == {"median": 3.0, "q25": 2.0, "q75": 4.0}
    assert largest_difference([1.0, 2.2, 3.0], [1.0, 2.0, 3.3]) == pytest.approx(0.1)
    assert math.isnan(largest_difference([1.0, math.nan], [1.0, 2.0]))


def test_both_engines_are_needed(tmp_path):
    done = bench("tiny", "--engines", "jaxllm", "--results", tmp_path)
    assert done.returncode == 2
    assert "--engines must name both" in done.stderr
