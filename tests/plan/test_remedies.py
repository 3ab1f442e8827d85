"""`python -m jaxllm.plan` of a step that does not fit says what would help, and by how much."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from jaxllm.core.hardware import TARGETS
from jaxllm.plan.__main__ import main
from tests.support.gpu_plans import config_of

# Compiled, never run: so large that hundredths of a GiB tell the remedies apart.
LARGE = dict(vocab_size=96, hidden_size=2048, intermediate_size=4096, num_hidden_layers=16, num_attention_heads=4)
REMEDY = re.compile(r"^(?:helps)? +(\S+): (\S+) \((\d+\.\d\d) GiB\)(, which fits)?$", re.MULTILINE)
PEAK = re.compile(r"^ +peak +(\d+\.\d+) *$", re.MULTILINE)


@pytest.mark.full  # six programs
def test_what_would_help_is_said_with_the_bytes_that_it_leads_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best comes first, although another is compiled before it. Three rows do not divide over more of fsdp."""
    config = config_of(tmp_path, LARGE, batch_size=3, param_dtype="float32")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("jaxllm.plan.__main__.missing_wheels", lambda: ["jax-cuda12-plugin"])

    def planned(*changes: str, memory_gib: float) -> str:
        monkeypatch.setitem(TARGETS, "h100", replace(TARGETS["h100"], memory_gib=memory_gib))
        assert main([str(config), "data.seq_len=1024", *changes]) == 0
        return capsys.readouterr().out

    # A CPU's program tells that it does not fit where the weights alone, 2.5 GiB, are too much.
    said = planned(memory_gib=2.6)
    assert "fits      no: between steps alone" in said
    (peak,), found = PEAK.findall(said), REMEDY.findall(said)
    assert [remedy[:2] for remedy in found] == [
        ("mesh.tensor", "2"),
        ("data.seq_len", "512"),
        ("train.micro_batch_size", "1"),
    ]
    assert [bool(fits) for *_, fits in found] == [True, False, False]
    peaks = [float(gib) for _, _, gib, _ in found]
    assert peaks == sorted(peaks)
    assert peaks[-1] < float(peak)

    applied = planned("mesh.tensor=2", memory_gib=80)
    assert [float(gib) for gib in PEAK.findall(applied)] == [pytest.approx(peaks[0], abs=0.006)]
