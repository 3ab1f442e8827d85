"""LISA: a few layers train at a time, as written out in a plain loop, and nothing else is computed or kept."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params
from safetensors.numpy import load_file

from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.models import FAMILIES
from jaxllm.optim.build import OPTIMIZERS, at_rate
from jaxllm.optim.config import OptimizerConfig
from jaxllm.optim.schedule_config import Constant
from jaxllm.peft.lisa import Lisa as LisaConfig
from jaxllm.peft.lora import Lora
from jaxllm.runs.config import Config
from jaxllm.step.selection import Draws
from tests.support.families import mesh_layout
from tests.support.small_runs import MAX_GRAD_NORM, assert_trained_alike, llama, program, ragged_batch, train
from tests.support.tiers import representatives
from tests.support.whole_runs import train as run
from tests.support.whole_runs import workplace

# Two programs that mean the same, in float64, of each leaf's largest value (DESIGN, section 5).
TOLERANCE = 1e-10
LAYERS, RATE = 4, 3e-3
SEPARATE = [name for name in OPTIMIZERS if not (OPTIMIZERS[name].needs_whole_model or OPTIMIZERS[name].averages)]
MODEL = dict(num_hidden_layers=LAYERS)


def optimizer(name: str = "adamw") -> OptimizerConfig:
    """Of a fresh AdamW with a small eps the first update is the sign of the gradient, which has the last bits of the
    smallest ones grow, and every interval begins with one.
    """
    more = dict(eps=1e-3) if name == "adamw" else {}
    constant = Constant(type="constant", warmup=0)
    return OPTIMIZERS[name](type=name, learning_rate=RATE, weight_decay=0.1, schedule=constant, **more)


def by_hand(lisa: Draws, steps: int, frozen: tuple[str, ...] = (), name: str = "adamw") -> dict[str, np.ndarray]:
    """The parameters after some steps: whole gradients, and an optax optimizer for the rest and for each layer."""
    made = program(llama(**MODEL), optimizer=optimizer(name), dtype="float64")
    params, tx = made.start().params, at_rate(optimizer(name), lambda step: RATE)
    chosen = tree.match(params, "*", exclude=frozen)

    def layer(params: Any, i: int) -> Any:
        return {"layers": jax.tree.map(lambda a: a[i : i + 1], params["layers"])}

    def rest(params: Any) -> Any:
        others = {name: part for name, part in params.items() if name != "layers"}
        return jax.tree.map(lambda leaf, keep: leaf if keep else None, others, {n: chosen[n] for n in others})

    @jax.jit
    def gradient(params: Any, batch: Any) -> Any:
        return jax.grad(lambda p: made.lm.losses(p, batch).objective / batch["loss_mask"].sum())(params)

    @jax.jit
    def updated(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rest_state, states = tx.init(rest(params)), {}
    for step in range(steps):
        batch = {name: jnp.asarray(a) for name, a in ragged_batch(step % 4).items()}
        grads = gradient(params, batch)
        if step % lisa.interval == 0:
            rows = [int(i) for i in lisa.rows(jnp.int32(step), LAYERS)]
            if lisa.state != "keep":
                states = {}
            if lisa.state == "reset_all":
                rest_state = tx.init(rest(params))
        norm = optax.tree.norm([rest(grads), *(layer(grads, i) for i in rows)])
        grads = jax.tree.map(lambda g, norm=norm: g * jnp.minimum(1, MAX_GRAD_NORM / (norm + 1e-6)), grads)
        new, rest_state = updated(rest(grads), rest_state, rest(params))
        params = tree.combine({**params, **new}, params)
        for i in rows:
            state = states.get(i) or tx.init(layer(params, i))
            new, states[i] = updated(layer(grads, i), state, layer(params, i))
            params["layers"] = jax.tree.map(lambda a, b, i=i: a.at[i].set(b[0]), params["layers"], new["layers"])
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}


def assert_alike(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    for path, wanted in theirs.items():
        np.testing.assert_allclose(ours[path], wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max(), err_msg=path)


def parameters(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path.removeprefix("params/"): leaf for path, leaf in state.items() if path.startswith("params/")}


@pytest.mark.parametrize(
    "state", ["reset_body", *(pytest.param(state, marks=pytest.mark.full) for state in ("reset_all", "keep"))]
)
def test_is_what_its_definition_says(state):
    lisa = Draws(active=2, interval=3, seed=1, state=state)
    with jax.enable_x64(True):
        ours = train(llama(**MODEL), steps=7, optimizer=optimizer(), dtype="float64", lisa=lisa)
        assert_alike(parameters(ours.state), by_hand(lisa, 7))


@pytest.mark.full
@pytest.mark.parametrize("name", representatives(SEPARATE, ["adamw", "lomo", "adalomo", "galore", "ademamix"]))
def test_every_optimizer(name):
    lisa = Draws(active=2, interval=3, seed=1)
    with jax.enable_x64(True):
        ours = train(llama(**MODEL), steps=7, optimizer=optimizer(name), dtype="float64", lisa=lisa)
        assert_alike(parameters(ours.state), by_hand(lisa, 7, name=name))


@pytest.mark.full
def test_all_layers_kept_is_full_training():
    lisa = Draws(active=LAYERS, interval=3, seed=0, state="keep")
    with jax.enable_x64(True):
        ours = train(llama(**MODEL), optimizer=optimizer(), dtype="float64", lisa=lisa)
        full = train(llama(**MODEL), optimizer=optimizer(), dtype="float64", remat="full")
        assert_alike(parameters(ours.state), parameters(full.state))
        for name, values in full.metrics.items():
            np.testing.assert_allclose(ours.metrics[name], values, rtol=TOLERANCE, err_msg=name)


@cache
def alone(frozen: tuple[str, ...]) -> Any:
    return train(llama(**MODEL), optimizer=optimizer(), dtype="float64", lisa=Draws(2, 3, 1), frozen=frozen)


@pytest.mark.parametrize(
    ("sizes", "micro_batches", "frozen"),
    [
        (dict(data=2, fsdp=2, tensor=2), 4, ()),
        (dict(pipeline=2, fsdp=2, tensor=2), 4, ()),
        pytest.param(dict(pipeline=4, data=2), 8, ("embed/*",), marks=pytest.mark.full),
        pytest.param(dict(pipeline=2, data=2, fsdp=2), 2, ("head/*", "norm/*"), marks=pytest.mark.full),
        pytest.param(dict(fsdp=8), 1, ("embed/*",), marks=pytest.mark.full),
        pytest.param(dict(data=2, tensor=4), 2, ("head/*", "norm/*"), marks=pytest.mark.full),
        pytest.param({}, 4, ("embed/*", "head/*", "norm/*"), marks=pytest.mark.full),
    ],
)
def test_a_mesh_and_accumulation_train_alike(sizes, micro_batches, frozen):
    with jax.enable_x64(True):
        options = dict(optimizer=optimizer(), dtype="float64", micro_batches=micro_batches, frozen=frozen)
        ours = train(llama(**MODEL), mesh_layout(**sizes), lisa=Draws(2, 3, 1), **options)
        assert_trained_alike(ours, alone(frozen), TOLERANCE)


@pytest.mark.full
def test_state_that_is_kept_of_every_layer_lies_in_its_stage():
    lisa, options = Draws(2, 3, 1, "keep"), dict(steps=7, optimizer=optimizer(), dtype="float64")
    with jax.enable_x64(True):
        made = program(llama(**MODEL), mesh_layout(pipeline=4), lisa=lisa, micro_batches=4)
        assert {leaf.sharding.spec[0] for leaf in jax.tree.leaves(made.start().opt_state.layers) if leaf.ndim > 1} == {
            "pipeline"
        }
        ours, alone = (
            train(llama(**MODEL), layout, lisa=lisa, micro_batches=4, **options)
            for layout in (mesh_layout(pipeline=4), None)
        )
        assert_trained_alike(ours, alone, TOLERANCE)


@pytest.mark.full
def test_dropout_is_that_of_full_training():
    lisa = Draws(active=LAYERS, interval=3, seed=0, state="keep")
    options = dict(steps=4, optimizer=optimizer(), dtype="float64", dropout=0.2, seed=5)
    with jax.enable_x64(True):
        ours, full = (train(llama(**MODEL), **options, lisa=one) for one in (lisa, None))
        assert_alike(parameters(ours.state), parameters(full.state))


@pytest.mark.parametrize(
    ("sizes", "how", "state"),
    [
        (dict(data=2, fsdp=2, tensor=2), dict(micro_batches=4), "reset_body"),
        pytest.param({}, dict(max_grad_norm=None, frozen=("embed/*",)), "reset_all", marks=pytest.mark.full),
        pytest.param(dict(fsdp=4), dict(micro_batches=2, max_grad_norm=None), "keep", marks=pytest.mark.full),
        pytest.param(
            dict(fsdp=2, tensor=2), dict(optimizer=optimizer("adalomo")), "reset_body", marks=pytest.mark.full
        ),
        pytest.param(dict(fsdp=2), dict(dropout=0.2, max_grad_value=1e-2), "keep", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_the_fused_step_is_the_ordinary_one(sizes, how, state):
    options: dict[str, Any] = dict(optimizer=optimizer(), dtype="float64", steps=7, lisa=Draws(2, 3, 1, state)) | how
    with jax.enable_x64(True):
        ours = train(llama(**MODEL), mesh_layout(**sizes), fused=True, **options)
        assert_trained_alike(ours, train(llama(**MODEL), **options | {"micro_batches": 1}), TOLERANCE)


ADAPTER = Lora(type="lora", r=3, use_dora=True, loraplus_lr_ratio=4.0, modules_to_save=("lm_head",), bias="all")
BIASED = dict(MODEL, attention_bias=True)


@pytest.mark.full
def test_all_layers_of_an_adapter_kept_is_training_the_adapter():
    options = dict(steps=7, optimizer=optimizer(), dtype="float64", method=ADAPTER)
    with jax.enable_x64(True):
        ours, whole = (train(llama(**BIASED), **options, lisa=one) for one in (Draws(LAYERS, 3, 0, "keep"), None))
        assert_alike(parameters(ours.state), parameters(whole.state))


@pytest.mark.parametrize(
    "sizes",
    [dict(data=2, fsdp=2, tensor=2), pytest.param(dict(pipeline=2, fsdp=2, tensor=2), marks=pytest.mark.full)],
    ids=str,
)
def test_a_mesh_trains_adapters_alike(sizes):
    lisa, options = Draws(2, 3, 1), dict(steps=7, optimizer=optimizer(), dtype="float64", method=ADAPTER)
    with jax.enable_x64(True):
        meant = train(llama(**BIASED), lisa=lisa, **options)
        ours = train(llama(**BIASED), mesh_layout(**sizes), lisa=lisa, micro_batches=2, **options)
        assert_trained_alike(ours, meant, TOLERANCE)
    moments = {path: leaf for path, leaf in meant.state.items() if "lora_magnitude" in path and "opt_state" in path}
    assert {leaf.shape[0] for leaf in moments.values()} == {2}


@pytest.mark.optimized
def test_layers_that_do_not_train_keep_their_bits():
    """Also while those above and below them train, with decay and momentum; switching compiles nothing."""
    lisa = Draws(active=1, interval=2, seed=3)
    made = program(llama(**MODEL), optimizer=optimizer(), lisa=lisa, max_grad_norm=None)
    state, trained = made.start(), set()
    for step in range(8):
        rows = [int(i) for i in lisa.rows(jnp.int32(step), LAYERS)]
        before = jax.tree.map(np.asarray, state.params["layers"])
        state, _ = made.compiled.run(state, made.place(ragged_batch(step % 4)))
        after = tree.flatten(state.params["layers"])
        for path, old in tree.flatten(before).items():
            moved = [i for i in range(LAYERS) if old[i].tobytes() != np.asarray(after[path])[i].tobytes()]
            assert moved == rows, path
        trained |= set(rows)
    assert len(trained) > 1


def test_draws_follow_from_seed_and_interval():
    lisa = Draws(active=3, interval=5, seed=0)
    draws = np.array([lisa.rows(jnp.int32(step), 12) for step in range(0, 2000, 5)])
    assert (np.diff(draws, axis=1) > 0).all()
    for step in range(5):
        np.testing.assert_array_equal(lisa.rows(jnp.int32(step), 12), draws[0])
    shares = np.bincount(draws.ravel(), minlength=12) / len(draws)
    # Six standard deviations of 400 draws of 3 in 12.
    assert np.abs(shares - 0.25).max() < 6 * np.sqrt(0.25 * 0.75 / 400)
    assert len({row.tobytes() for row in draws}) > 100
    others = np.array([Draws(3, 5, 1).rows(jnp.int32(step), 12) for step in range(0, 100, 5)])
    assert not np.array_equal(others, draws[:20])


# Memory and work

DEEP = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4, vocab_size=512)


def weights(config: Any, *parts: str) -> int:
    made = program(config, shape=(1, 64))
    return sum(leaf.nbytes for part in parts for leaf in jax.tree.leaves(made.start().params[part]))


@pytest.mark.full
@pytest.mark.optimized
def test_memory_is_that_of_the_active_layers():
    """Optimizer state, gradients and what is made of them for 2 of 24 layers; the inputs of all."""
    config = FAMILIES["llama"].config(**DEEP)
    layer, others = weights(config, "layers") / 24, weights(config, "embed", "norm", "head")
    options = dict(optimizer=optimizer(), shape=(1, 64))
    lisa = program(config, lisa=Draws(2, 20, 0), **options).compiled
    full = program(config, remat="full", **options).compiled
    parameters = 24 * layer + others
    assert lisa.argument_bytes < parameters + 2 * (2 * layer + others) + 2**16
    assert full.argument_bytes > 3 * parameters
    inputs, activations = 24 * 64 * 256 * 4, 16 * 64 * 1024 * 4
    # Gradients and their clipped form; new state, the old one being read in the same step; one layer's gradient.
    assert lisa.temp_bytes < inputs + activations + 5 * (2 * layer + others) + layer
    assert full.temp_bytes > 24 * layer > lisa.temp_bytes


@pytest.mark.full
@pytest.mark.optimized
def test_a_fused_update_holds_one_of_the_active_layers():
    """Of eight active layers in 24, with few tokens: no gradients, and no second copies of weights and moments."""
    config = FAMILIES["llama"].config(**DEEP)
    layer, others = weights(config, "layers") / 24, weights(config, "embed", "norm", "head")
    how = dict(lisa=Draws(8, 20, 0), optimizer=optimizer("lomo"), shape=(1, 64), max_grad_norm=None)
    fused, ordinary = (program(config, fused=fused, **how).compiled for fused in (True, False))
    inputs, activations = 24 * 64 * 256 * 4, 16 * 64 * 1024 * 4
    assert fused.temp_bytes < inputs + activations + 2 * others + 3 * layer
    assert ordinary.temp_bytes - fused.temp_bytes > 8 * layer  # the gradients


def products(jaxpr: Any, inside: bool = False) -> list[tuple[bool, tuple[int, ...]]]:
    """The shape of every matrix product, and whether it is in a loop whose end is not known beforehand."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            found.append((inside, eqn.outvars[0].aval.shape))
        for inner in jaxprs_in_params(eqn.params):
            found += products(inner, inside or eqn.primitive.name == "while")
    return found


def test_no_gradient_of_a_frozen_weight_is_computed():
    """The loops over the layers that do not train have products with weights, and none that makes one."""
    made = program(llama(**MODEL), lisa=Draws(2, 3, 1))
    kernels = {leaf.shape[1:] for path, leaf in tree.flatten(made.start().params).items() if "/kernel" in path[7:]}
    gradients = {shape[::order] for shape in kernels for order in (1, -1)}
    found = products(jax.make_jaxpr(made.step)(made.start(), made.place(ragged_batch(0))).jaxpr)
    assert sum(inside for inside, _ in found) >= 7  # a layer has seven products, each computed again and turned back
    assert not [shape for inside, shape in found if inside and shape in gradients]
    assert len([shape for inside, shape in found if not inside and shape in gradients]) >= 7


def test_no_stage_computes_the_gradient_of_a_frozen_weight():
    """All that make one are in the loop over the layers of a stage that train, whose end is not known beforehand."""
    made = program(llama(**MODEL), mesh_layout(pipeline=2), lisa=Draws(2, 3, 1), micro_batches=2)
    kernels = {leaf.shape[1:] for path, leaf in tree.flatten(made.start().params).items() if "/kernel" in path[7:]}
    gradients = {(2, *shape[::order]) for shape in kernels for order in (1, -1)}
    found = products(jax.make_jaxpr(made.step)(made.start(), made.place(ragged_batch(0), 2)).jaxpr)
    assert len([shape for inside, shape in found if inside and shape in gradients]) >= 7
    assert not [shape for inside, shape in found if not inside and shape in gradients]


@pytest.mark.full
@pytest.mark.optimized
def test_memory_of_stages_is_that_of_the_active_layers_however_many_the_micro_batches():
    def compiled(micro_batches: int, **how: Any) -> Any:
        sizes = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
        options = dict(micro_batches=micro_batches, shape=(4 * micro_batches, 16), optimizer=optimizer())
        return program(llama(num_hidden_layers=32, **sizes), mesh_layout(pipeline=4), **options, **how).compiled

    few, many = (compiled(micro_batches, lisa=Draws(2, 20, 0)) for micro_batches in (4, 8))
    assert many.temp_bytes == few.temp_bytes
    full = compiled(4)
    layer = 4 * (4 * 128**2 + 3 * 128 * 512)
    assert full.argument_bytes - few.argument_bytes > 2 * (8 - 2) * layer  # moments of two layers instead of a stage
    assert full.temp_bytes - few.temp_bytes > (8 - 2) * layer  # and gradients


# Whole runs

TINY = ["peft={type: lisa, active_layers: 1, interval: 3}", "checkpoint.every=4", "checkpoint.keep=9"]


@pytest.mark.full
def test_a_run_goes_on_in_the_middle_of_an_interval(tmp_path, shared):
    with workplace(tmp_path, shared) as config:
        whole = run(config, *TINY)
        assert whole.status == 0
        assert "peft" in whole.said
        again = [f"output_dir={tmp_path / 'again'}", f"checkpoint.resume={whole.folder / 'checkpoints' / '4'}"]
        resumed = run(config, *TINY, *again)
    ours, theirs = (load_file(one.folder / "export" / "hf" / "model.safetensors") for one in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    losses = [[line["train/loss"] for line in one.metrics() if "train/loss" in line] for one in (resumed, whole)]
    assert losses[0] == losses[1][4:]


def test_an_optimizer_of_the_whole_model_is_refused():
    values: dict[str, Any] = {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"sources": [{"path": "text.jsonl"}], "seq_len": 128},
        "peft": {"type": "lisa"},
        "optim": {"type": "adamw", "learning_rate": 1e-3},
        "train": {"steps": 10, "batch_size": 32},
    }
    Config.model_validate(values)
    with pytest.raises((ValueError, UserError), match="gives each layer an optimizer of its own"):
        Config.model_validate({**values, "optim": {"type": "prodigy"}})


def test_more_layers_than_there_are():
    lm = program(llama()).lm
    assert LisaConfig(type="lisa", active_layers=2).trained_at_a_time(lm) == lm.parameter_count()
    one = LisaConfig(type="lisa", active_layers=1, train_embed=False, train_head=False, train_norm=False)
    of_layers = sum(leaf.size for leaf in jax.tree.leaves(lm.abstract()["layers"]))
    assert one.trained_at_a_time(lm) == of_layers // 2
    with pytest.raises(UserError, match="active_layers is 3 and the model has 2 layers"):
        LisaConfig(type="lisa", active_layers=3).mask(lm)
    adapter = Lora.model_validate({"type": "lora", "lisa": {"active_layers": 1}})
    assert 2 * adapter.trained_at_a_time(adapter.add(lm)) == Lora(type="lora").trained_at_a_time(adapter.add(lm))
    with pytest.raises(UserError, match=r"peft\.lisa\.active_layers is 3"):
        Lora.model_validate({"type": "lora", "lisa": {"active_layers": 3}}).mask(adapter.add(lm))
    with pytest.raises(UserError, match="layer 1 has no adapter"):
        Lora.model_validate({"type": "lora", "lisa": {}, "layers_to_transform": (0,)}).mask(adapter.add(lm))
