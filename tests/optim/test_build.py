"""The `optim:` section: what it accepts, what it builds, what it refuses."""

import inspect
from pathlib import Path
from typing import Annotated, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import ValidationError

from jaxllm import optim
from jaxllm.core.config import ByType, Section, dump, load
from jaxllm.core.errors import UserError
from jaxllm.optim import schedule, wrapped
from jaxllm.optim.build import OPTIMIZERS, AdamW, build
from jaxllm.optim.config import OptimizerConfig
from jaxllm.optim.schedule_config import SCHEDULES, Cosine, Linear, ScheduleConfig, WarmupStableDecay


class Root(Section):
    optim: Annotated[OptimizerConfig, ByType(OPTIMIZERS)]


def read(tmp_path: Path, text: str) -> OptimizerConfig:
    file = tmp_path / "config.yaml"
    file.write_text(f"optim: {{{text}}}")
    return load(file, [], Root).optim


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_are_those_of_the_transform(name: str) -> None:
    config = OPTIMIZERS[name](type=name, learning_rate=1e-3)
    contrib = ("ademamix", "galore", "muon", "prodigy", "schedule_free_sgd", "schedule_free_adamw")
    makers = {name: getattr(optax.contrib, name) for name in contrib}
    makers |= {"adafactor": optax.adafactor, "sgd": optax.sgd, "nadamw": optax.adamw}
    own_transform = name in optim.__all__
    make = getattr(optim, name) if own_transform else makers.get(name) or getattr(optax, name)
    defaults = {p.name: p.default for p in inspect.signature(make).parameters.values()}
    own = {"scale"} if name == "galore" else set()  # the authors' own
    own |= {"learning_rate", "schedule", "type"} | (set() if own_transform else {"weight_decay"})
    for field, value in config:
        if field in defaults and field not in own:
            assert value in (defaults[field], defaults[field] or 0), field


def test_every_setting_of_our_own_functions_is_explained() -> None:
    ours = {name: OPTIMIZERS[name] for name in OPTIMIZERS if OPTIMIZERS[name].__module__ != wrapped.__name__}
    settings = [(name, key, field) for name in ours for key, field in ours[name].model_fields.items()]
    shared = OptimizerConfig.model_fields
    assert "galore" in ours
    assert [(name, key) for name, key, field in settings if key not in shared and not field.description] == []


@pytest.mark.parametrize("registry", [OPTIMIZERS, SCHEDULES])
def test_the_registered_name_is_the_type(registry) -> None:
    for name in registry:
        assert get_args(registry[name].model_fields["type"].annotation) == (name,)


def test_a_section_in_full_is_read_built_and_written_back(tmp_path: Path) -> None:
    text = (
        "type: adamw, learning_rate: 1e-3, b1: 0.8, weight_decay: 1, no_decay: ['*/bias'], "
        "schedule: {type: wsd, warmup: 0.1, decay: 20, final: 0.5}"
    )
    config = read(tmp_path, text)
    assert isinstance(config, AdamW)
    (tmp_path / "again.yaml").write_text(dump(Root(optim=config)))
    assert load(tmp_path / "again.yaml", [], Root).optim == config

    _, rate = build(config, total_steps=100)
    steps = np.arange(100)
    np.testing.assert_array_equal(
        jax.vmap(rate)(steps), jax.vmap(schedule.wsd(1e-3, 100, warmup_steps=10, decay_steps=20, final=0.5))(steps)
    )


def test_the_default_schedule_is_a_cosine_to_a_tenth() -> None:
    config = AdamW(type="adamw", learning_rate=1.0)
    _, rate = build(config, total_steps=1000)
    assert [float(rate(i)) for i in (0, 29, 1000)] == pytest.approx([1 / 30, 1.0, 0.1])


PARAMS = {
    "embed": {"table": jnp.ones((4, 2))},
    "layers": {
        "attn_norm": {"scale": jnp.ones((3, 2))},
        "attn": {"q": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    },
    "norm": {"scale": jnp.ones(2)},
    "head": {"kernel": jnp.ones((2, 4))},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_biases_and_norms_do_not_decay(name: str) -> None:
    estimate = {"estim_lr0": 0.1} if name == "prodigy" else {}
    config = OPTIMIZERS[name](type=name, learning_rate=0.1, weight_decay=0.5, **estimate)
    tx, _ = build(config, total_steps=1)

    @jax.jit
    def step(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.apply_updates(params, tx.update(zeros, tx.init(params), params)[0])

    after = step(PARAMS)
    changed = jax.tree.map(lambda a, b: bool((a != b).all()), after, PARAMS)
    unchanged = jax.tree.map(lambda a, b: bool((a == b).all()), after, PARAMS)
    assert changed == {
        "embed": {"table": True},
        "layers": {"attn_norm": {"scale": False}, "attn": {"q": {"kernel": True, "bias": False}}},
        "norm": {"scale": False},
        "head": {"kernel": True},
    }
    assert unchanged == jax.tree.map(lambda moved: not moved, changed)


def test_decay_patterns_may_match_nothing() -> None:
    config = AdamW(type="adamw", learning_rate=0.1, weight_decay=0.5, no_decay=("*/nothing",))
    tx, _ = build(config, total_steps=1)
    tx.init(PARAMS)


def test_adalomo_takes_stacked_layers() -> None:
    config = OPTIMIZERS["adalomo"](type="adalomo", learning_rate=0.1)
    state = jax.eval_shape(build(config, total_steps=1)[0].init, PARAMS)
    assert optax.tree.get(state, "v_row")["layers"]["attn"]["q"]["kernel"].shape == (3, 2)


def test_warmup_longer_than_the_run_is_refused() -> None:
    section = '{"type": "adamw", "learning_rate": 1, "schedule": {"type": "linear", "warmup": 11}}'
    with pytest.raises(UserError, match=r"optim\.schedule\.warmup is 11 steps, but the run has 10"):
        build(AdamW.model_validate_json(section), total_steps=10)


def test_decay_longer_than_the_rest_of_the_run_is_refused() -> None:
    section = '{"type": "adamw", "learning_rate": 1, "schedule": {"type": "wsd", "warmup": 0.5, "decay": 6}}'
    with pytest.raises(UserError, match=r"decay is 6 steps, but after .*warmup \(5 steps\) 5 of 10 are left"):
        build(AdamW.model_validate_json(section), total_steps=10)


def wsd_of(**changes: Any) -> WarmupStableDecay:
    return WarmupStableDecay(type="wsd", warmup=0.1, decay=20, final=0.5, shape="linear", **changes)


def test_a_schedule_of_its_own_length() -> None:
    """A shorter run is a part of it, and in a longer one the rate stays at its end; shares are of the schedule."""
    whole = jax.vmap(schedule.wsd(1.0, 100, 10, 20, 0.5, "linear"))(np.arange(200))
    for run_steps in (50, 200):
        rate = wsd_of(steps=100).build(1.0, run_steps)
        np.testing.assert_array_equal(jax.vmap(rate)(np.arange(run_steps)), whole[:run_steps])


def test_a_schedule_in_words() -> None:
    words = "wsd: 10 steps of warm-up to 0.001, stable until step 80, then linear decay to "
    assert wsd_of().describe(1e-3, 100) == words + "0.000524 at step 100"
    assert wsd_of(steps=100).describe(1e-3, 50) == (
        words + "0.001 at step 50, where the run ends; the schedule has 100 steps"
    )
    assert Cosine(type="cosine", warmup=5).describe(1.0, 50) == "cosine: 5 steps of warm-up to 1, 0.101 at step 50"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Linear(type="linear", warmup=0.5, steps=100), r"warmup is 50 steps, but the run has 40"),
        (Linear(type="linear", warmup=20, steps=10), r"warmup is 20 steps, but the schedule has 10"),
        (Linear(type="linear", warmup=2, steps=10), r"steps is 10, and the run has 40: its last 30 steps would have "),
    ],
    ids=["warm-up past the run", "warm-up past the schedule", "no rate left"],
)
def test_a_schedule_that_does_not_suit_the_run_is_refused(section: ScheduleConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        section.build(1.0, 40)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("type: adamw, learning_rate: -1e-3", "config.yaml:1: optim.learning_rate: must be greater than 0"),
        ("type: adamw, learning_rate: .nan", "config.yaml:1: optim.learning_rate: "),
        ("type: adamw, learning_rate: fast", "config.yaml:1: optim.learning_rate: must be a number"),
        ("type: adamw, learning_rate: 1, b2: 1.0", "config.yaml:1: optim.b2: must be less than 1"),
        ("type: adamw, learning_rate: 1, b1: -0.1", "config.yaml:1: optim.b1: must be "),
        ("type: adamw, learning_rate: 1, weight_decay: -1", "config.yaml:1: optim.weight_decay: must be "),
        ("type: adamw, learning_rate: 1, rho: 0.1", "config.yaml:1: optim.rho: unknown key"),
        ("type: adanw, learning_rate: 1", "Did you mean 'ad"),
        ("type: adamw, learning_rate: 1, schedule: {type: cosin}", "Did you mean 'cosine'?"),
        ("type: adamw, learning_rate: 1, schedule: {type: constant, final: 0.1}", "optim.schedule.final: unknown key"),
        ("type: adamw, learning_rate: 1, schedule: {type: linear, warmup: 1.5}", "must be a number of steps"),
        ("type: adamw, learning_rate: 1, schedule: {type: linear, warmup: -1}", "must be a number of steps"),
        ("type: adamw, learning_rate: 1, schedule: {type: linear, warmup: true}", "must be a number of steps"),
        ("type: adamw, learning_rate: 1, schedule: {type: linear, warmup: '3'}", "must be a number of steps"),
    ],
)
def test_bad_input_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_sections_are_strict_in_python_too() -> None:
    assert AdamW(type="adamw", learning_rate=1).learning_rate == 1.0
    with pytest.raises(ValidationError):
        AdamW(type="adamw", learning_rate="1e-3")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rates_and_decays_out_of_range_are_refused(tmp_path: Path, name: str) -> None:
    """A negative or zero rate, negative weight decay, betas below 0 or from 1 on, for every optimizer."""
    betas = [field for field in OPTIMIZERS[name].model_fields if field in ("b1", "b2", "b3", "beta", "momentum")]
    cases = [("learning_rate", -1e-3), ("learning_rate", 0), ("learning_rate", ".inf"), ("weight_decay", -0.1)]
    cases += [(beta, value) for beta in betas for value in (-0.1, 1, 1.5)]
    for field, value in cases:
        given = {"type": name, "learning_rate": 1e-3, field: value}
        with pytest.raises(UserError, match=f"optim.{field}"):
            read(tmp_path, ", ".join(f"{key}: {value}" for key, value in given.items()))
