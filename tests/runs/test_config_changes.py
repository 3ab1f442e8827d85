"""What may change in a config when a run goes on: every key has the mark that it should, and means what it says."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest

from jaxllm.callbacks.base import CALLBACKS
from jaxllm.core.config import OnResume, Section, load
from jaxllm.core.config.on_resume import marks
from jaxllm.core.config.reference import settings
from jaxllm.core.errors import UserError
from jaxllm.data.records.source import SourceConfig
from jaxllm.data.rows.loader import DataConfig
from jaxllm.nn.rope import ROPES
from jaxllm.optim.build import OPTIMIZERS
from jaxllm.optim.schedule_config import SCHEDULES
from jaxllm.peft import METHODS
from jaxllm.runs.config import Config, EvalConfig
from jaxllm.runs.config_changes import changes, harmless, mark_of
from jaxllm.runs.model_config import NEW_MODELS, PretrainedModel
from jaxllm.runs.train_config import TrainConfig
from tests.support.whole_runs import tiny_config

BOTH = (OnResume.REFUSED, OnResume.NEW_FOLDER)
# override → the mark of the key that it changes
CHANGED = {
    "output_dir=elsewhere": OnResume.FREE,
    "seed=1": OnResume.REFUSED,
    "model.num_hidden_layers=3": OnResume.REFUSED,
    "data.seq_len=64": OnResume.REFUSED,
    "data.sources.0.path=moved.jsonl": OnResume.NOTED,
    "data.sources.0.format=text": OnResume.REFUSED,
    "mesh.fsdp=1": OnResume.NOTED,
    "mesh.rules={mlp: []}": OnResume.NOTED,
    "optim.learning_rate=1e-4": OnResume.NEW_FOLDER,
    "optim.schedule.warmup=3": OnResume.NEW_FOLDER,
    "train.steps=99": OnResume.NOTED,
    "train.batch_size=4": OnResume.NEW_FOLDER,
    "train.micro_batch_size=2": OnResume.NOTED,
    "train.remat=full": OnResume.NOTED,
    "train.param_dtype=bfloat16": OnResume.REFUSED,
    "train.compute_dtype=bfloat16": OnResume.NOTED,
    "checkpoint.every=2": OnResume.NOTED,
    "checkpoint.resume=none": OnResume.FREE,
    "evals.0.every=3": OnResume.NOTED,
    "evals.1={name: more, path: more.jsonl, every: 5}": OnResume.NOTED,
}

# What becomes of every key, or of the section that it is in; the longest name counts. `*` is any item of a list.
MARKS = {
    "output_dir": OnResume.FREE,
    "seed": OnResume.REFUSED,
    "model": OnResume.REFUSED,
    "data": OnResume.REFUSED,
    "data.sources.*.path": OnResume.NOTED,  # what the files hold is compared
    "data.sources.*.chat_template": OnResume.NOTED,  # likewise
    "mesh": OnResume.NOTED,
    "peft": OnResume.REFUSED,
    "optim": OnResume.NEW_FOLDER,
    "optim.type": OnResume.REFUSED,
    **{
        f"train.{name}": OnResume.NOTED
        for name in (
            *("steps", "epochs", "micro_batch_size", "update", "reduce_dtype", "shard_optimizer"),
            *("offload_optimizer", "remat", "virtual_stages", "compute_dtype", "max_bad_steps", "unroll"),
            *("attention", "deterministic", "xla"),
        )
    },
    **{
        f"train.{name}": OnResume.NEW_FOLDER
        for name in (
            *("batch_size", "max_grad_norm", "max_grad_value", "label_smoothing", "z_loss", "dropout"),
            "stochastic_rounding",
        )
    },
    "train.param_dtype": OnResume.REFUSED,
    "distributed": OnResume.FREE,
    "checkpoint": OnResume.NOTED,
    "checkpoint.resume": OnResume.FREE,
    "evals": OnResume.NOTED,
    "metrics": OnResume.NOTED,
    "callbacks": OnResume.NOTED,
}


def expected(key: str) -> OnResume:
    name = re.sub(r"\.\d+(?=\.|$)", ".*", key)
    while name and name not in MARKS:
        name = name.rpartition(".")[0]
    return MARKS.get(name, OnResume.REFUSED)


def made(section: type[Section], **values: Any) -> Any:
    """A section whose other fields have their defaults, or None."""
    needed = {name: None for name, field in section.model_fields.items() if field.is_required()}
    return section.model_construct(**{**needed, **values})


def configs() -> Iterator[tuple[Config, set[str]]]:
    """Configs that have each component in turn, and the types of the components that each has."""
    registries = (NEW_MODELS, ROPES, OPTIMIZERS, SCHEDULES, METHODS, CALLBACKS)
    for turn in range(max(map(len, registries))):
        types = [list(registry)[turn % len(registry)] for registry in registries]
        model, rope, optim, schedule, peft, callback = (
            made(registry[kind], type=kind) for registry, kind in zip(registries, types, strict=True)
        )
        config = made(
            Config,
            model=model.model_copy(update={"rope": rope}) if turn else made(PretrainedModel),
            data=made(DataConfig, sources=[made(SourceConfig)]),
            optim=optim.model_copy(update={"schedule": schedule}),
            peft=peft,
            train=made(TrainConfig),
            evals=[made(EvalConfig)],
            callbacks=[callback],
        )
        yield config, {*types}


def test_every_key_has_the_mark_that_it_should() -> None:
    every = settings(Config)
    left = {(key.name, key.type) for key in every}
    for config, types in configs():
        known = dict(marks(config))
        for key in every:
            if key.type is None or key.type in types:
                left.discard((key.name, key.type))
                assert mark_of(key.name, known) is expected(key.name), key.name
        assert {key: mark for key, mark in known.items() if mark is not expected(key)} == {}
    assert left == set()


def test_a_key_of_a_new_component_brings_its_mark_and_is_refused_without_one() -> None:
    class Part(Section):
        plain: int = 0
        marked: Annotated[int, OnResume.FREE] = 0

    class Narrowed(Part):
        marked: Literal[0] = 0
        parts: tuple[Part, ...] = (Part(),)

    class Root(Section):
        unmarked: Narrowed = Narrowed()
        noted: Annotated[Narrowed, OnResume.NOTED] = Narrowed()

    found = dict(marks(Root()))
    for section, otherwise in ("unmarked", OnResume.REFUSED), ("noted", OnResume.NOTED):
        of_keys = {key: mark for key, mark in found.items() if key.startswith(f"{section}.")}
        free = {f"{section}.marked", f"{section}.parts.0.marked"}
        assert {key for key, mark in of_keys.items() if mark is OnResume.FREE} == free
        assert {mark for key, mark in of_keys.items() if key not in free} == {otherwise}


@pytest.fixture
def path(tmp_path, shared):
    return tiny_config(tmp_path, shared)


@pytest.mark.parametrize("override", CHANGED)
def test_a_change(override, path):
    there, now, mark = load(path, [], Config), load(path, [override], Config), CHANGED[override]
    found = changes(there, now)
    key = override.partition("=")[0]
    assert found
    assert all(change.key.startswith(key) for change in found)
    assert {change.mark for change in found} == {mark}
    if mark in BOTH:
        with pytest.raises(UserError, match=rf"another config: {key} \(there: .*, now: .*\)"):
            harmless(found, BOTH, "RUN", "CONFIG")
    else:
        assert harmless(found, BOTH, "RUN", "CONFIG") == (found if mark is OnResume.NOTED else [])


def test_all_that_is_wrong_is_said_at_once(path):
    now = load(path, ["seed=3", "optim.learning_rate=1e-4", "checkpoint.keep=7"], Config)
    found = changes(load(path, [], Config), now)
    with pytest.raises(UserError) as refused:
        harmless(found, BOTH, "RUN", "CONFIG")
    assert "seed (there: 0, now: 3); optim.learning_rate (there: 0.01, now: 0.0001). Choose" in str(refused.value)
    with pytest.raises(UserError, match=r"config: seed \(there: 0, now: 3\)\. Choose"):
        harmless(found, (OnResume.REFUSED,), "RUN", "CONFIG")
    with pytest.raises(UserError, match=r"config: checkpoint\.keep"):
        harmless(found[2:], BOTH, "RUN", "CONFIG", also=["checkpoint.keep"])


def test_nothing_has_changed(path):
    assert changes(load(path, [], Config), load(path, [], Config)) == []
