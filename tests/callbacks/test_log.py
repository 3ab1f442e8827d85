"""Lines of metrics.jsonl, and those who hear of them."""

import io
import json
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxllm.callbacks.base import Event
from jaxllm.callbacks.log import Log, MetricsFile, memory_peaks
from jaxllm.callbacks.tensorboard import TensorBoardConfig
from jaxllm.core.errors import UserError
from tests.support.tensorboard_events import shown

VALUES = dict(loss=2.0, grad_norm=1.0, learning_rate=0.1, trained_tokens=30.0, bad=0.0, data_wait_s=0.0)


def written(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_shows_no_step_twice(tmp_path):
    """Killed after step 5, resumed after step 3; then begun anew."""
    begun, lines = 0.0, {}
    for resumed_at, steps in ((None, range(6)), (3, range(4, 8)), (None, range(2))):
        begun += 100
        board = TensorBoardConfig().open(tmp_path, resumed_at)
        metrics = MetricsFile(tmp_path / "metrics.jsonl", resumed_at, [board])
        for step in steps:
            metrics.write(step, {"train/loss": begun + step, "eval/a/loss": float("nan")})
        # Nothing is closed, as after a kill: what is written is there.
        lines = {line["step"]: line["train/loss"] for line in written(tmp_path)}
        seen = shown(tmp_path / "tensorboard")
        assert {step: value for (step, name), value in seen.items() if name == "train/loss"} == lines
        assert all(np.isnan(seen[step, "eval/a/loss"]) for step in lines)
        time.sleep(1.1)  # event files are named and ordered by the second
    assert list(lines) == [0, 1]


def test_what_a_crash_left_of_a_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "train/loss": 3.0}\n\xff\xfe\0\n{"step": 2, "tra')
    metrics = MetricsFile(path, 2)
    metrics.close()
    assert written(tmp_path) == [{"step": 1, "train/loss": 3.0}]
    (said,) = metrics.notes
    assert f"{path}: lines dropped that no run writes" in said
    assert said.endswith(": 2 (the first is line 2)")


OTHERS = [
    b'{"step": null, "eval/held_out/loss": 1}',
    b'{"step": 1, "eval/held_out/loss": "abc"}',
    b'{"step": 1, "eval/held_out/loss": null}',
    b'{"step": 1, "eval/held_out/loss": [1]}',
    b'{"step": 1, "eval/held_out/loss": NaN}',
    b'{"step": 1, "eval/held_out/loss": 1' + b"0" * 400 + b"}",
    b'{"step": 1' + b"0" * 5000 + b"}",
    b'{"step": "1"}',
    b'{"step": 1.5}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"eval/held_out/loss": 1}',
    b"[1]",
    b"7",
    b'"step"',
    b"null",
    b"[" * 100_000,
    b'{"step": 1, "train/l\xffss": 1}',
    b"\0\0",
]


def test_lines_that_no_run_writes_are_dropped_and_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = {"step": 1, "eval/held_out/loss": 2.0, "eval/other/loss": "nan"}
    last = {"step": 2, "eval/held_out/loss": 1}
    path.write_bytes(b"\n".join([json.dumps(first).encode(), *OTHERS, json.dumps(last).encode(), b'{"step": 3}\n']))
    metrics = MetricsFile(path, 2)
    metrics.close()
    assert written(tmp_path) == [first, last]
    assert metrics.values("eval/held_out/loss") == {1: 2.0, 2: 1.0}
    damaged, again = metrics.notes
    assert damaged.endswith(f": {len(OTHERS)} (the first is line 2)")
    assert again == f"{path}: lines dropped of steps after 2, which are trained again: 1"


@pytest.mark.parametrize("resumed_at", [None, 2])
def test_a_folder_in_the_place_of_the_metrics(resumed_at, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be read \(Is a directory\).* move it away"):
        MetricsFile(tmp_path / "metrics.jsonl", resumed_at)


def log_lines(tmp_path, steps: int, **how) -> list[dict]:
    """The lines of `steps` steps of 40 tokens, 10 of them trained, in half a second each."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl", None)
    settings = dict(
        steps=steps,
        start=0,
        norms_every=2,
        tokens_through=lambda step: 40 * step,
        flops=(6e9, 3e9),
        peak=None,
        first={"perf/compile_s": 1.5},
        records=lambda step: [],
        max_bad_steps=3,
    )
    log = Log(metrics, Console(file=io.StringIO()), **{**settings, **how})
    for step in range(1, steps + 1):
        values = {**VALUES, "step_time_s": 0.5, "grad_norm/attn": 0.5, "param_norm/attn": 5.0}
        log.on_event(Event(step, None, step == steps, {step: values}))
    log.close()
    metrics.close()
    return written(tmp_path)


def test_rates_and_shares_of_the_peak(tmp_path):
    first, second = log_lines(tmp_path, 2, peak=1e12)
    assert (first["train/tokens"], second["train/tokens"]) == (40, 80)
    assert second["perf/tokens_per_s"] == 80.0
    assert second["perf/mfu"] == pytest.approx(6e9 * 80 / 1e12)
    assert second["perf/mfu_useful"] == pytest.approx(3e9 * 80 / 1e12)
    assert first["perf/compile_s"] == 1.5
    assert "perf/compile_s" not in second


def test_no_share_of_an_unknown_peak(tmp_path):
    assert not [name for line in log_lines(tmp_path, 1) for name in line if "mfu" in name]


def test_norms_of_groups_come_every_so_many_steps(tmp_path):
    lines = log_lines(tmp_path, 5)
    assert [line["step"] for line in lines if line.get("train/grad_norm/attn") == 0.5] == [2, 4]
    assert [line["step"] for line in lines if line.get("train/param_norm/attn") == 5.0] == [2, 4]


def test_peak_memory_is_of_the_fullest_device(monkeypatch):
    def devices(*peaks):
        return [SimpleNamespace(memory_stats=lambda peak=peak: peak and {"peak_bytes_in_use": peak}) for peak in peaks]

    block = np.ones(2**27)  # a GiB, touched
    del block
    monkeypatch.setattr(jax, "local_devices", lambda: devices(2**30, 3 * 2**30))
    peaks = memory_peaks()
    assert peaks["mem/peak_gib"] == 3.0
    assert peaks["mem/host_peak_gib"] > 1.0
    monkeypatch.setattr(jax, "local_devices", lambda: devices(None))
    assert memory_peaks().keys() == {"mem/host_peak_gib"}
