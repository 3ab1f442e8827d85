"""What every optimizer promises, over all that are exported or registered."""

import doctest
import importlib
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxllm.optim
from jaxllm import optim
from jaxllm.optim.build import OPTIMIZERS, build
from jaxllm.optim.wrappers import per_layer
from tests.support.optimizers import section

EXPORTED = [name for name in optim.__all__ if name.islower()]
# A rate at which 100 steps bring the quadratic below a hundredth of where it starts.
RATES = {"adalomo": 0.3, "adan": 0.3, "lomo": 0.05}


def transform(name: str, rate: optax.ScalarOrSchedule = 1e-2) -> optax.GradientTransformationExtraArgs:
    """An exported transform by its name, or a registered section's as `config:name`."""
    if not name.startswith("config:"):
        tx = getattr(optim, name)(rate, weight_decay=0.01)
        return per_layer(tx) if name == "adalomo" else tx
    return build(section(name.removeprefix("config:")), total_steps=20)[0]


REGISTERED = [f"config:{name}" for name in OPTIMIZERS]
# Those of the exported transforms are built of these.
OWN_SECTIONS = [name for name in REGISTERED if name.removeprefix("config:") not in EXPORTED]


def model(dtype=jnp.float32):
    """Parameters with a stack of two layers; every size is a multiple of 4."""
    keys = iter(jax.random.split(jax.random.key(0), 4))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.float32).astype(dtype)

    return {
        "embed": {"table": normal(8, 4)},
        "layers": {"q": {"kernel": normal(2, 4, 8), "bias": normal(2, 8)}, "norm": {"scale": normal(2, 4)}},
    }


def gradients_like(params, steps: int):
    """Fixed gradients of several steps, a leading axis."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return jax.tree.unflatten(
        structure,
        [jax.random.normal(key, (steps, *p.shape), p.dtype) for key, p in zip(keys, leaves, strict=True)],
    )


@pytest.mark.parametrize("name", EXPORTED)
def test_descends_a_quadratic_without_compiling_twice(name: str) -> None:
    target = model()
    tx = transform(name, optax.linear_schedule(RATES.get(name, 0.1), 0.0, 100))

    def loss(params):
        return sum(jnp.sum((p - t) ** 2) for p, t in zip(*map(jax.tree.leaves, (params, target)), strict=True))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        # Unknown extra arguments are accepted, as in any chain.
        updates, state = tx.update(jax.grad(loss)(params), state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(lambda t: t + jnp.sign(t), target)
    state = jax.jit(tx.init)(params)
    before = loss(params)
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 0.01 * before
    chex.clear_trace_counter()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", [*EXPORTED, *REGISTERED])
def test_bfloat16_parameters_have_float32_state_and_updates_as_their_gradients(name: str, dtype) -> None:
    params = model(jnp.bfloat16)
    tx = transform(name)

    def step(params):
        grads = jax.tree.map(lambda p: p.astype(dtype), params)
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, state, optax.apply_updates(params, updates)

    updates, state, after = jax.eval_shape(step, params)
    chex.assert_trees_all_equal_dtypes(updates, jax.tree.map(lambda p: p.astype(dtype), params))
    chex.assert_trees_all_equal_shapes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    chex.assert_trees_all_equal_shapes_and_dtypes(state, jax.eval_shape(tx.init, params))


PARAMETER_TREES = {"adamw": 2, "lion": 1, "adan": 4, "sophia_g": 2, "lomo": 0, "adalomo": 2, "sgd": 1, "nadamw": 2}
PARAMETER_TREES |= {"radam": 2, "ademamix": 3, "adagrad": 1, "rmsprop": 2, "adafactor": 3}
PARAMETER_TREES |= {"schedule_free_sgd": 1, "schedule_free_adamw": 2, "prodigy": 4, "muon": 2, "galore": 3}
BYTES = {"adamw": 8, "lion": 4, "adan": 16, "sophia_g": 8, "lomo": 0}
BYTES |= {"config:sgd": 4, "config:nadamw": 8, "config:radam": 8, "config:ademamix": 12, "config:adagrad": 4}
BYTES |= {"config:rmsprop": 8, "config:schedule_free_sgd": 4, "config:schedule_free_adamw": 8, "config:prodigy": 16}


@pytest.mark.parametrize("name", BYTES)
def test_state_has_the_stated_bytes(name: str) -> None:
    params = model(jnp.bfloat16)
    state = jax.eval_shape(transform(name).init, params)
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert held == BYTES[name] * sum(p.size for p in jax.tree.leaves(params))


def test_adalomo_state_is_rows_and_columns() -> None:
    params = model(jnp.bfloat16)
    state = jax.eval_shape(transform("adalomo").init, params)
    rows, columns = optax.tree.get(state, "v_row"), optax.tree.get(state, "v_col")
    assert rows["layers"]["q"]["kernel"].shape == (2, 4)
    assert columns["layers"]["q"]["kernel"].shape == (2, 8)
    assert (rows["embed"]["table"].shape, columns["embed"]["table"].shape) == ((8,), (4,))
    assert rows["layers"]["q"]["bias"].shape == (2, 8)


@pytest.mark.parametrize("name", [*EXPORTED, *REGISTERED])
def test_state_can_be_mapped_with_the_parameters(name: str) -> None:
    """`optax.tree.map_params` pairs each array of the state with its parameter: this lays the state out."""
    params = jax.eval_shape(model)
    tx = transform(name)
    state = jax.eval_shape(tx.init, params)
    pairs = []
    optax.tree.map_params(tx, lambda leaf, p: pairs.append((leaf.shape, p.shape)), state, params)
    assert len(pairs) == len(jax.tree.leaves(params)) * PARAMETER_TREES[name.removeprefix("config:")]
    # An array of the state has its parameter's dimensions, or some of them; one without use has 1, a rank is 3.
    assert all({*of_state} <= {*of_param, 1, 3} for of_state, of_param in pairs)


@pytest.mark.parametrize("name", REGISTERED)
def test_masked_leaves_are_untouched_and_have_no_state(name: str) -> None:
    params = model()
    grads = jax.tree.map(lambda g: g[0], gradients_like(params, 1))
    labels = {"embed": "frozen", "layers": {"q": "trained", "norm": "frozen"}}
    tx = optax.partition({"trained": transform(name), "frozen": optax.set_to_zero()}, labels)

    @jax.jit
    def step(params, grads):
        state = tx.init(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    after, state = step(params, grads)
    chex.assert_trees_all_equal(after["embed"], params["embed"])
    chex.assert_trees_all_equal(after["layers"]["norm"], params["layers"]["norm"])
    assert not np.array_equal(after["layers"]["q"]["kernel"], params["layers"]["q"]["kernel"])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not [path for path in paths if "embed" in path or "norm" in path]


@pytest.mark.parametrize("name", REGISTERED)
def test_holes_are_skipped(name: str) -> None:
    """The trainable half of a model has None where a frozen leaf was: same result as a tree without it."""
    params = {"layers": model()["layers"]}
    grads = jax.tree.map(lambda g: g[0], gradients_like(params, 1))
    tx = transform(name)

    @jax.jit
    def first_update(params, grads):
        return tx.update(grads, tx.init(params), params)[0]

    hole = {"embed": {"table": None}}
    with_holes = first_update({**hole, **params}, {**hole, **grads})
    assert with_holes["embed"]["table"] is None
    chex.assert_trees_all_equal(with_holes["layers"], first_update(params, grads)["layers"])


@pytest.mark.parametrize("name", [*EXPORTED, *OWN_SECTIONS])
def test_sharded_equals_unsharded(name: str) -> None:
    """In float64, where rounding is no excuse, on eight devices: 1e-12 of the largest value after 3 steps."""
    with jax.enable_x64(True):
        params = model(jnp.float64)
        grads = gradients_like(params, 3)
        tx = transform(name)

        def run(params, grads):
            def step(carry, grads):
                params, state = carry
                updates, state = tx.update(grads, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

        expected = jax.jit(run)(params, grads)
        mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("fsdp", "tensor"))
        specs = {
            "embed": {"table": P("tensor", "fsdp")},
            "layers": {
                "q": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
                "norm": {"scale": P(None, "fsdp")},
            },
        }

        def put(x, spec):
            return jax.device_put(x, NamedSharding(mesh, spec))

        sharded = jax.tree.map(put, params, specs)
        sharded_grads = jax.tree.map(lambda g, spec: put(g, P(None, *spec)), grads, specs)
        actual = jax.jit(run)(sharded, sharded_grads)

        assert {leaf.dtype for leaf in jax.tree.leaves(actual)} <= {jnp.dtype("float64"), jnp.dtype("int32")}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1e-300, np.abs(b).max(initial=0))),
            actual,
            expected,
        )


@pytest.mark.parametrize("name", EXPORTED)
def test_settings_may_be_arrays_in_the_state(name: str) -> None:
    """`optax.inject_hyperparams` traces every number, those that are 0 by default as well."""

    def trained(weight_decay: float, *, injected: bool):
        make = getattr(optim, name)
        make = optax.inject_hyperparams(make) if injected else make
        tx = make(learning_rate=0.1, weight_decay=weight_decay)
        params = {"w": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "b": jnp.array([5.0, -0.5])}
        state = tx.init(params)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    for weight_decay in (0.0, 0.1):
        # A setting of float32 and a Python float round differently: last bits.
        chex.assert_trees_all_close(
            trained(weight_decay, injected=True), trained(weight_decay, injected=False), rtol=1e-5
        )


@pytest.mark.parametrize("name", EXPORTED)
def test_float32_stays_float32_where_jax_has_float64(name: str) -> None:
    """`optax.apply_if_finite` among others wants the updates in the dtype of the gradients."""
    params = model()
    with jax.enable_x64(True):
        tx = optax.apply_if_finite(transform(name, optax.linear_schedule(0.1, 0.0, 100)), 3)
        updates, state = jax.eval_shape(lambda: tx.update(params, tx.init(params), params))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        assert jnp.dtype("float64") not in {leaf.dtype for leaf in jax.tree.leaves(state)}


MODULES = [f"jaxllm.optim.{module.name}" for module in pkgutil.iter_modules(jaxllm.optim.__path__)]


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert not failed
    assert attempted or module.rsplit(".", 1)[1] not in EXPORTED


def always(step):
    return step >= 0


WRAPPERS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, always),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1e9), tx),
}


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("name", EXPORTED)
def test_bfloat16_parameters_in_optax_s_wrappers(name: str, how: str) -> None:
    """Each wrapper, which here always updates, gives what the transform alone gives, and compiles."""
    params = model(jnp.bfloat16)
    grads = jax.tree.map(lambda p: 0.5 * p, params)
    tx = transform(name)
    wrapped = WRAPPERS[how](tx)
    updates, _ = jax.jit(wrapped.update)(grads, wrapped.init(params), params)
    expected, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    # Two compilations may round a bfloat16 to either neighbour.
    chex.assert_trees_all_close(optax.apply_updates(params, updates), optax.apply_updates(params, expected), rtol=2**-7)
    chex.assert_trees_all_equal_shapes_and_dtypes(optax.apply_updates(params, updates), params)


@pytest.mark.parametrize("name", EXPORTED)
def test_complex_parameters_are_updated_as_optax_does_or_refused(name: str) -> None:
    params = {"w": jnp.array([1 + 2j, -3j, 0.5], jnp.complex64)}
    grads = {"w": jnp.array([0.1 - 1j, 2, 1j], jnp.complex64)}
    theirs = {"adamw": optax.adamw, "lion": optax.lion, "lomo": optax.sgd}
    if name not in theirs:
        with pytest.raises(ValueError, match="the parameter 'w' is complex64"):
            transform(name).init(params)
        return
    reference = theirs[name](1e-2) if name == "lomo" else theirs[name](1e-2, weight_decay=0.1)
    tx = optim.lomo(1e-2) if name == "lomo" else getattr(optim, name)(1e-2, weight_decay=0.1)
    ours, _ = tx.update(grads, tx.init(params), params)
    wanted, _ = reference.update(grads, reference.init(params), params)
    chex.assert_trees_all_equal(ours, wanted)


def test_the_clamp_of_lomo_is_for_real_numbers() -> None:
    with pytest.raises(ValueError, match="give its real and imaginary parts"):
        optim.lomo(1e-2, clip_grad_value=1.0).init({"w": jnp.zeros(2, jnp.complex64)})
