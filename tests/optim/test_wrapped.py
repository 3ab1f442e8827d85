"""The sections of optax's optimizers: the trajectories of PyTorch's, of transformers' and of the papers' equations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers.optimization import Adafactor

from jaxllm.optim.build import OPTIMIZERS, build
from jaxllm.optim.schedule_config import Constant
from tests.optim.test_build import PARAMS

STEPS = 20
RATE, DECAY = 1e-2, 0.1


def section(name: str, **settings: Any) -> Any:
    constant = Constant(type="constant", warmup=0)
    settings = {"learning_rate": RATE, "weight_decay": DECAY, "schedule": constant, "no_decay": (), **settings}
    return OPTIMIZERS[name](type=name, **settings)


def start_and_gradients() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(6, 4)), "vector": rng.normal(size=5)}
    return params, {name: rng.normal(size=(STEPS, *p.shape)) for name, p in params.items()}


def ours(config: Any, gradients: Any = lambda g: g, state: str = "") -> Any:
    """The parameters, and a tree of the state if one is named, in float64."""
    with jax.enable_x64(True):
        params, grads = jax.tree.map(jnp.asarray, start_and_gradients())
        grads = jax.tree.map(gradients, grads)
        tx, _ = build(config, STEPS)

        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        moved, after = jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)[0])(
            params, grads
        )
        found = (moved, optax.tree.get(after, state)) if state else moved
        return jax.tree.map(np.asarray, found)


def by_torch(make: Any, **settings: Any) -> dict[str, np.ndarray]:
    params, grads = start_and_gradients()
    leaves = {name: torch.nn.Parameter(torch.from_numpy(p.copy())) for name, p in params.items()}
    optimizer = make(leaves.values(), lr=RATE, **settings)
    for step in range(STEPS):
        for name, leaf in leaves.items():
            leaf.grad = torch.from_numpy(grads[name][step])
        if settings.get("weight_decay") is None:  # PyTorch has this optimizer without decoupled decay
            with torch.no_grad():
                for leaf in leaves.values():
                    leaf.mul_(1 - RATE * DECAY)
        optimizer.step()
    return {name: leaf.detach().numpy() for name, leaf in leaves.items()}


# PyTorch adds Adagrad's eps to the root, optax below it: with 1e-20 neither is seen.
BY_TORCH = {
    "sgd": ({}, "SGD", {}),
    "sgd with momentum": (dict(momentum=0.9), "SGD", dict(momentum=0.9)),
    "sgd with nesterov": (dict(momentum=0.9, nesterov=True), "SGD", dict(momentum=0.9, nesterov=True)),
    "rmsprop": ({}, "RMSprop", dict(alpha=0.9)),
    "adagrad": (dict(eps=1e-20), "Adagrad", dict(eps=1e-20, initial_accumulator_value=0.1)),
    "radam": (dict(b2=0.9), "RAdam", dict(betas=(0.9, 0.9), weight_decay=DECAY, decoupled_weight_decay=True)),
}


@pytest.mark.parametrize("case", BY_TORCH)
def test_equals_pytorch(case: str) -> None:
    settings, name, theirs = BY_TORCH[case]
    config = section(case.split()[0], **settings)
    assert_close(ours(config), by_torch(getattr(torch.optim, name), **theirs))


def assert_close(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], rtol: float = 1e-10) -> None:
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=rtol, atol=rtol, err_msg=name)


@pytest.mark.parametrize("scaled", [True, False])
def test_adafactor_equals_that_of_transformers(scaled: bool) -> None:
    settings = dict(relative_step=False, warmup_init=False, scale_parameter=scaled)
    theirs = by_torch(Adafactor, weight_decay=0.0, **settings)
    config = section("adafactor", weight_decay=0.0, min_dim_size_to_factor=1, multiply_by_parameter_scale=scaled)
    # optax computes the decay of the moment in float32.
    assert_close(ours(config), theirs, rtol=1e-5)


def by_equation(direction: Any) -> dict[str, np.ndarray]:
    params, grads = start_and_gradients()
    for name in params:
        state: dict[str, Any] = dict.fromkeys(("m", "slow", "v"), 0.0)
        for t in range(1, STEPS + 1):
            params[name] = params[name] - RATE * (direction(grads[name][t - 1], state, t) + DECAY * params[name])
    return params


def test_nadamw_is_its_equation() -> None:
    def direction(g, state, t):
        state["m"] = 0.9 * state["m"] + 0.1 * g
        state["v"] = 0.999 * state["v"] + 0.001 * g**2
        ahead = 0.9 * state["m"] / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
        return ahead / (np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8)

    assert_close(ours(section("nadamw")), by_equation(direction))


def test_ademamix_is_its_equation() -> None:
    def direction(g, state, t):
        state["m"] = 0.9 * state["m"] + 0.1 * g
        state["slow"] = 0.99 * state["slow"] + 0.01 * g
        state["v"] = 0.999 * state["v"] + 0.001 * g**2
        root = np.sqrt(state["v"] / (1 - 0.999**t)) + 1e-8
        return (state["m"] / (1 - 0.9**t) + 5 * state["slow"]) / root

    assert_close(ours(section("ademamix", b3=0.99)), by_equation(direction))


WARM = Constant(type="constant", warmup=5)
RATES = RATE * np.minimum(1, np.arange(1, STEPS + 1) / 5)


@pytest.mark.parametrize("name", ["schedule_free_sgd", "schedule_free_adamw"])
def test_schedule_free_is_its_equations(name: str) -> None:
    """x, y and z of the paper's section 2, with the weights of its authors' code: the square of the largest rate."""
    b1, b2 = 0.8, 0.99
    settings = dict(b2=b2) if name.endswith("adamw") else {}
    config = section(name, b1=b1, schedule=WARM, **settings)
    params, grads = start_and_gradients()
    trained = ours(config, state="z")
    for key, x in params.items():
        z, v, weights = x, 0.0, 0.0
        y = x
        for t in range(1, STEPS + 1):
            g, rate = grads[key][t - 1], RATES[t - 1]
            if settings:
                v = b2 * v + (1 - b2) * g**2
                g = g / (np.sqrt(v / (1 - b2**t)) + 1e-8)
            z = z - rate * (g + DECAY * y)
            weights += rate**2
            x = x + rate**2 / weights * (z - x)
            y = b1 * x + (1 - b1) * z
        assert_close({key: trained[0][key]}, {key: y})
        assert_close({key: config.evaluation_params(*trained)[key]}, {key: x})


def test_prodigy_is_its_algorithm() -> None:
    """Algorithm 4 of the paper with the bias correction of its authors' code, where the rate's estimate has grown."""
    params, grads = start_and_gradients()
    b1, b2, d = 0.9, 0.999, 1e-3
    b3 = np.sqrt(b2)
    start = {key: p.copy() for key, p in params.items()}
    m, v, s = ({key: np.zeros_like(p) for key, p in params.items()} for _ in range(3))
    # A gradient that points one way, so that the distance to the start grows.
    grads = {key: np.abs(g) for key, g in grads.items()}
    r = 0.0
    for t in range(1, STEPS + 1):
        rate = d * min(1, t / 5) * np.sqrt(1 - b2**t) / (1 - b1**t)
        r = b3 * r + d * rate / 1e-3**2 * sum(np.vdot(grads[k][t - 1], start[k] - params[k]) for k in params) * 1e-3
        for k in params:
            g = grads[k][t - 1]
            m[k] = b1 * m[k] + (1 - b1) * d * g
            v[k] = b2 * v[k] + (1 - b2) * (d * g) ** 2
            s[k] = b3 * s[k] + rate * d * g / 1e-3
        estimate = max(d, r / sum(np.abs(x).sum() for x in s.values()))
        for k in params:
            params[k] = params[k] - rate * (m[k] / (np.sqrt(v[k]) + estimate * 1e-8) + DECAY * params[k])
        d = estimate
    assert d > 2e-3
    config = section("prodigy", learning_rate=1.0, estim_lr0=1e-3, schedule=WARM)
    assert_close(ours(config, gradients=np.abs), params, rtol=1e-8)


def test_prodigy_waits_for_a_gradient() -> None:
    """A first batch without trained tokens leaves an estimate; optax's becomes NaN."""
    zeros, ones = (jax.tree.map(fill, PARAMS) for fill in (jnp.zeros_like, jnp.ones_like))

    def estimates(tx: optax.GradientTransformation) -> list[float]:
        state, found = tx.init(PARAMS), []
        for grads in (zeros, ones):
            _, state = tx.update(grads, state, PARAMS)
            found.append(float(optax.tree.get(state, "estim_lr")))
        return found

    assert np.isnan(estimates(optax.contrib.prodigy())).all()
    assert estimates(build(section("prodigy"), STEPS)[0]) == [pytest.approx(1e-6)] * 2


def whitened(momentum: np.ndarray) -> np.ndarray:
    """Muon's orthogonal factor of a matrix as Hugging Face stores it, [out, in] (the author's code, in float64)."""
    wide = momentum.T if momentum.shape[0] > momentum.shape[1] else momentum
    x = wide / (np.linalg.norm(wide) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if momentum.shape[0] > momentum.shape[1] else x


@pytest.mark.parametrize("consistent_rms", [None, 0.2])
def test_muon_is_a_loop_over_matrices_and_adamw(consistent_rms: float | None) -> None:
    """Three layers' matrices each by themselves, transposed; the embedding, a matrix too, by AdamW at its own rate."""
    rng, beta, adam_rate = np.random.default_rng(0), 0.95, 3e-3
    params = {
        "embed": {"table": rng.normal(size=(7, 4))},
        "layers": {"down": {"kernel": rng.normal(size=(3, 6, 4))}, "up": {"kernel": rng.normal(size=(3, 4, 6))}},
        "norm": {"scale": rng.normal(size=4)},
    }
    # Layers whose gradients differ in size: a norm over several would show.
    grads = jax.tree.map(lambda p: rng.normal(size=(3, *p.shape)), params)
    for name in ("down", "up"):
        grads["layers"][name]["kernel"] *= (10.0 ** np.arange(3))[:, None, None]
    config = section("muon", consistent_rms=consistent_rms, adam_learning_rate=adam_rate)
    tx, _ = build(config, STEPS)
    with jax.enable_x64(True):

        @jax.jit
        def run(params: Any, grads: Any) -> Any:
            state = tx.init(params)
            for t in range(3):
                updates, state = tx.update(jax.tree.map(lambda g, t=t: g[t], grads), state, params)
                params = optax.apply_updates(params, updates)
            return params

        moved = jax.tree.map(np.asarray, run(*jax.tree.map(jnp.asarray, (params, grads))))
    for name in ("down", "up"):
        for layer in range(3):
            w, m = params["layers"][name]["kernel"][layer].T, 0.0
            for t in range(1, 4):
                g = grads["layers"][name]["kernel"][t - 1, layer].T
                m = beta * m + (1 - beta) * g
                ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
                factor = max(1, w.shape[0] / w.shape[1]) ** 0.5 if consistent_rms is None else 0.2 * max(w.shape) ** 0.5
                w = w - RATE * (factor * whitened(ahead) + DECAY * w)
            assert_close({name: moved["layers"][name]["kernel"][layer]}, {name: w.T}, rtol=1e-9)
    for part, leaf in (("embed", "table"), ("norm", "scale")):
        w, m, v = params[part][leaf], 0.0, 0.0
        for t in range(1, 4):
            g = grads[part][leaf][t - 1]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            w = w - adam_rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + DECAY * w)
        assert_close({part: moved[part][leaf]}, {part: w}, rtol=1e-9)


def test_galore_is_a_loop_over_matrices_and_adamw() -> None:
    """Each layer's matrix as Hugging Face has it, [out, in], wide and tall, over two projections."""
    rng = np.random.default_rng(0)
    shapes = {"down": (3, 6, 4), "up": (3, 4, 6)}
    params = {"layers": {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}}
    grads = jax.tree.map(lambda p: rng.normal(size=(4, *p.shape)) * np.array([1, 10, 100])[:, None, None], params)
    config = section("galore", rank=2, update_proj_gap=2)
    tx, _ = build(config, STEPS)
    with jax.enable_x64(True):

        @jax.jit
        def run(params: Any, grads: Any) -> Any:
            state = tx.init(params)
            for t in range(4):
                updates, state = tx.update(jax.tree.map(lambda g, t=t: g[t], grads), state, params)
                params = optax.apply_updates(params, updates)
            return params

        moved = jax.tree.map(np.asarray, run(*jax.tree.map(jnp.asarray, (params, grads))))
    for name, layer in ((name, layer) for name in shapes for layer in range(3)):
        w, m, v, p = params["layers"][name]["kernel"][layer].T, 0.0, 0.0, np.zeros(0)
        for t in range(1, 5):
            g = grads["layers"][name]["kernel"][t - 1, layer].T
            tall = g.shape[0] >= g.shape[1]
            if t % 2 == 1:
                u, _, vh = np.linalg.svd(g)
                p = vh[:2].T if tall else u[:, :2]
                p = p * np.sign(p[np.abs(p).argmax(0), [0, 1]])
            r = g @ p if tall else p.T @ g
            m, v = 0.9 * m + 0.1 * r, 0.999 * v + 0.001 * r**2
            n = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            w = w - RATE * (0.25 * (n @ p.T if tall else p @ n) + DECAY * w)
        assert_close({name: moved["layers"][name]["kernel"][layer]}, {name: w.T}, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].has_statistics])
def test_a_layer_of_a_stack_is_updated_as_if_alone(name: str) -> None:
    settings = dict(min_dim_size_to_factor=1) if name == "adafactor" else {}
    tx, _ = build(section(name, **settings), STEPS)
    layers = PARAMS["layers"]
    keys = iter(jax.random.split(jax.random.key(0), 8))
    # The layers' gradients and parameters differ in size, so that a mean over several would show.
    sizes = 10.0 ** jnp.arange(3)

    def normal(p: jax.Array) -> jax.Array:
        return jax.random.normal(next(keys), p.shape) * sizes.reshape(-1, *[1] * (p.ndim - 1))

    params, grads = jax.tree.map(normal, layers), jax.tree.map(normal, layers)

    @jax.jit
    def two_updates(params, grads):
        params, grads = {"layers": params}, {"layers": grads}
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)[0]["layers"]

    stacked = two_updates(params, grads)
    for i in range(3):
        alone = two_updates(*jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (params, grads)))
        jax.tree.map(
            lambda one, all, i=i: np.testing.assert_allclose(one[0], all[i], rtol=1e-5, atol=1e-8), alone, stacked
        )
