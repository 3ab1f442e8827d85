"""What may change in a config when a run goes on: every key is in the table, and means what it says."""

import pytest

from jaxllm.core.config import load
from jaxllm.core.errors import UserError
from jaxllm.runs.config import Config
from jaxllm.runs.config_changes import Rule, changes, harmless, rule_of
from tests.support.whole_runs import tiny_config

BOTH = (Rule.REFUSED, Rule.NEW_FOLDER)
# override → the rule of the key that it changes
CHANGED = {
    "output_dir=elsewhere": Rule.FREE,
    "seed=1": Rule.REFUSED,
    "model.num_hidden_layers=3": Rule.REFUSED,
    "data.seq_len=64": Rule.REFUSED,
    "data.sources.0.path=moved.jsonl": Rule.SAID,
    "data.sources.0.format=text": Rule.REFUSED,
    "mesh.fsdp=1": Rule.SAID,
    "mesh.rules={mlp: []}": Rule.SAID,
    "optim.learning_rate=1e-4": Rule.NEW_FOLDER,
    "optim.schedule.warmup=3": Rule.NEW_FOLDER,
    "train.steps=99": Rule.SAID,
    "train.batch_size=4": Rule.NEW_FOLDER,
    "train.micro_batch_size=2": Rule.SAID,
    "train.remat=full": Rule.SAID,
    "train.param_dtype=bfloat16": Rule.REFUSED,
    "train.compute_dtype=bfloat16": Rule.SAID,
    "checkpoint.every=2": Rule.SAID,
    "checkpoint.resume=none": Rule.FREE,
    "evals.0.every=3": Rule.SAID,
    "evals.1={name: more, path: more.jsonl, every: 5}": Rule.SAID,
}


@pytest.fixture
def path(tmp_path, shared):
    return tiny_config(tmp_path, shared)


@pytest.mark.parametrize("override", CHANGED)
def test_a_change(override, path):
    there, now, rule = load(path, [], Config), load(path, [override], Config), CHANGED[override]
    found = changes(there, now)
    key = override.partition("=")[0]
    assert found
    assert all(change.key.startswith(key) for change in found)
    assert {rule_of(change.key) for change in found} == {rule}
    if rule in BOTH:
        with pytest.raises(UserError, match=rf"another config: {key} \(there: .*, now: .*\)"):
            harmless(found, BOTH, "RUN", "CONFIG")
    else:
        assert harmless(found, BOTH, "RUN", "CONFIG") == (found if rule is Rule.SAID else [])


def test_all_that_is_wrong_is_said_at_once(path):
    now = load(path, ["seed=3", "optim.learning_rate=1e-4", "checkpoint.keep=7"], Config)
    found = changes(load(path, [], Config), now)
    with pytest.raises(UserError) as refused:
        harmless(found, BOTH, "RUN", "CONFIG")
    assert "seed (there: 0, now: 3); optim.learning_rate (there: 0.01, now: 0.0001). Choose" in str(refused.value)
    with pytest.raises(UserError, match=r"config: seed \(there: 0, now: 3\)\. Choose"):
        harmless(found, (Rule.REFUSED,), "RUN", "CONFIG")
    with pytest.raises(UserError, match=r"config: checkpoint\.keep"):
        harmless(found[2:], BOTH, "RUN", "CONFIG", also=["checkpoint.keep"])


def test_nothing_has_changed(path):
    assert changes(load(path, [], Config), load(path, [], Config)) == []
