"""Small training runs: a tiny Llama, ragged batches, and some steps on any mesh."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxllm.core import tree
from jaxllm.core.layer_order import rearranged
from jaxllm.core.mesh import Layout
from jaxllm.models import FAMILIES, LM
from jaxllm.models.family import FamilyConfig
from jaxllm.models.fit_layout import fit_layout
from jaxllm.models.quantized import Quantization
from jaxllm.models.stack import RematConfig, Stack
from jaxllm.objectives.base import CROSS_ENTROPY, Objective
from jaxllm.optim.build import AdamW, at_rate, build
from jaxllm.optim.config import OptimizerConfig
from jaxllm.optim.curvature import Curvature
from jaxllm.optim.schedule_config import Cosine
from jaxllm.optim.wrappers import scale_updates
from jaxllm.peft import PeftConfig
from jaxllm.step.at_once import AtOnce
from jaxllm.step.batch import BATCH_AXES, batch_shapes
from jaxllm.step.build import build_step
from jaxllm.step.compile import CompiledStep, compile_step
from jaxllm.step.gradient import accumulated
from jaxllm.step.layer_states import LayerStates
from jaxllm.step.selection import Draws
from jaxllm.step.state import Step, TrainState, abstract_state, new_state
from jaxllm.step.update import make_step
from tests.support.families import draw_params, on_layout, quantized, read_back, small_lm

VOCAB = 101  # no mesh divides it
ROWS, LENGTH = 32, 12
STEPS = 20

# The norm of a few of the first gradients is above, that of the others below (asserted by test_mesh_equality).
MAX_GRAD_NORM = 4.0
OPTIMIZER = AdamW(type="adamw", learning_rate=1e-2, weight_decay=0.1, schedule=Cosine(type="cosine", warmup=5))


def llama(**changes: Any) -> FamilyConfig:
    """Two layers of width 32 with 8 heads."""
    sizes = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    heads = dict(num_attention_heads=8, num_key_value_heads=8, head_dim=4, max_position_embeddings=64)
    return FAMILIES["llama"].config(**{**sizes, **heads, **changes})


def ragged_batch(seed: int, rows: int = ROWS, length: int = LENGTH, packed: bool = True) -> dict[str, np.ndarray]:
    """`[rows, length]` arrays: documents of every length packed into rows, or one in each; padding at their ends.

    The first eighth of the rows trains nothing, so the first of up to eight micro-batches is empty; the next row is
    all padding; of the others between none and all tokens are trained.
    """
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in range(rows):
        start, document = 0, 0
        end = 0 if row == rows // 8 else rng.integers(1, length + 1)
        while start < end:
            document += 1
            stop = min(end, start + rng.integers(1, length)) if packed else end
            positions[row, start:stop] = np.arange(stop - start)
            segments[row, start:stop] = document
            start = stop
    trained = (rng.random(shape) < rng.random((rows, 1))) & (segments > 0)
    trained[: rows // 8] = False
    return {
        "tokens": rng.integers(0, VOCAB, shape, dtype=np.int32),
        "targets": rng.integers(0, VOCAB, shape, dtype=np.int32),
        "positions": positions,
        "segments": segments,
        "loss_mask": trained.astype(np.float32),
    }


class Program(NamedTuple):
    """A compiled training step and the state that it starts from."""

    lm: LM
    layout: Layout
    step: Step
    compiled: CompiledStep
    start: Callable[[], TrainState]  # made anew each time: a step gives away the buffers of its argument

    def place(self, batch: dict[str, np.ndarray], micro_batches: int = 1) -> dict[str, jax.Array]:
        """The batch cut into micro-batches and laid out."""
        sharding = self.layout.sharding(*BATCH_AXES)
        return {name: jax.device_put(a.reshape(micro_batches, -1, a.shape[-1]), sharding) for name, a in batch.items()}


def program(
    config: FamilyConfig,
    layout: Layout | None = None,
    *,
    tx: Any = None,
    schedule: optax.Schedule = lambda step: 1.0,
    optimizer: OptimizerConfig = OPTIMIZER,
    fused: bool = False,
    curvature: Curvature | None = None,
    by_layer: bool | None = None,
    lisa: Draws | None = None,
    frozen: Sequence[str] = (),
    method: PeftConfig | None = None,
    quantization: Quantization | None = None,
    as_floats: bool = False,
    micro_batches: int = 1,
    scattered: bool = False,
    offloaded: bool = False,
    reduce_dtype: str | None = None,
    remat: RematConfig = "none",
    unroll: int = 1,
    stack: Stack | None = None,
    virtual_stages: int = 1,
    max_grad_norm: float | None = MAX_GRAD_NORM,
    max_grad_value: float | None = None,
    dtype: str = "float32",
    compute_dtype: str | None = None,
    objective: Objective = CROSS_ENTROPY,
    dropout: float = 0.0,
    stochastic_rounding: bool = False,
    seed: int = 0,
    shape: tuple[int, int] = (ROWS, LENGTH),
    block: Any = None,
) -> Program:
    """The compiled step of a small model, by default with AdamW on one device; the same weights on any layout.

    tx, schedule: in place of `optimizer`'s own. by_layer: see `build_step`; None = as a run of `optimizer` does.
    frozen: patterns of the parameters that do not train. method: of fine-tuning, whose leaves are all drawn at random.
    quantization: of the layers' matrices; as_floats: those that it reads back are parameters as they are. dtype:
    of parameters, and of the computation where no other is given; float16 scales the loss. stack: in place of what
    `build_step` makes of `remat` and `unroll`. shape: sequences in a whole batch, and tokens in each. block: in place
    of the family's.
    """
    lm = replace(small_lm(config, dtype=dtype), compute_dtype=jnp.dtype(compute_dtype or dtype), dropout=dropout)
    scale_loss = compute_dtype == "float16"
    layout = fit_layout(config, layout or Layout.single())
    if block is not None:
        lm = replace(lm, family=replace(lm.family, block=block))
    if method is not None:
        lm = method.add(lm)
    moved, params = on_layout(lm, layout, draw_params(lm))
    if quantization is not None:
        in_few_bits = replace(moved, quantization=quantization)
        if as_floats:
            params = read_back(in_few_bits, params)
        else:
            moved, params = in_few_bits, quantized(in_few_bits, params)
    moved = replace(moved, virtual_stages=virtual_stages)
    if tx is None:
        tx, schedule = build(optimizer, STEPS, moved.padded)
    chosen = tree.match(params, "*", exclude=frozen)
    if method is not None:
        chosen, tx = method.mask(moved), method.transform(scale_updates(tx, method.rates()), moved, STEPS)
    if lisa is not None:
        rates = method.rates() if method is not None else {}
        rated = lambda rate: scale_updates(at_rate(optimizer, rate, moved.padded), rates)  # noqa: E731
        tx = LayerStates(rated, schedule, lisa)
    placed = dict(scattered=scattered, offloaded=offloaded, whole_layers=fused or lisa is not None)
    abstract = abstract_state(moved.abstract(), chosen, tx, layout, scale_loss=scale_loss, **placed)
    options = dict(objective=objective, max_grad_norm=max_grad_norm, max_grad_value=max_grad_value)
    options |= dict(stochastic_rounding=stochastic_rounding, seed=seed)
    if stack is not None:
        step = make_step(moved, tx, schedule, backward=AtOnce(accumulated(stack)), **options)
    else:
        step = build_step(
            moved,
            tx,
            schedule,
            draws=lisa,
            update="fused" if fused else "ordinary",
            remat=remat,
            unroll=unroll,
            reduce_dtype=reduce_dtype,
            shard_optimizer=scattered,
            curvature=curvature,
            penalty=None if method is None else method.penalty(moved),
            by_layer=optimizer.needs_whole_matrices if by_layer is None else by_layer,
            **options,
        )
    rows, length = shape
    batch = batch_shapes((micro_batches, rows // micro_batches, length), layout)
    compiled = compile_step(step, abstract, batch, layout)
    host = jax.tree.map(np.asarray, params)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def start() -> TrainState:
        state = new_state(jax.tree.map(jnp.array, host), chosen, tx, scale_loss=scale_loss)
        return rearranged(jax.device_put(state, shardings), moved.layer_order)

    return Program(moved, layout, step, compiled, start)


class Trained(NamedTuple):
    """What `train` did. metrics: `{name: [steps]}`. state: `{path: array}` of parameters and moments."""

    metrics: dict[str, np.ndarray]
    state: dict[str, np.ndarray]


def train(
    config: FamilyConfig, layout: Layout | None = None, *, steps: int = STEPS, packed: bool = True, **how: Any
) -> Trained:
    """`steps` steps on four batches in turn. packed: see `ragged_batch`."""
    made = program(config, layout, **how)
    how = dict(micro_batches=how.get("micro_batches", 1), packed=packed)
    state, metrics = run(made, made.start(), range(steps), **how)
    return Trained(metrics, on_host(made, state))


def run(
    made: Program, state: TrainState, steps: Iterable[int], *, micro_batches: int = 1, packed: bool = True
) -> tuple[TrainState, dict[str, np.ndarray]]:
    """The state after `steps`, by their numbers, on four batches in turn; and each metric of every step."""
    batches = [made.place(ragged_batch(seed, packed=packed), micro_batches) for seed in range(4)]
    metrics = []
    for step in steps:
        state, values = made.compiled.run(state, batches[step % 4])
        metrics.append(jax.tree.map(float, values))
    return state, {name: np.array([values[name] for values in metrics]) for name in metrics[0]}


def on_host(made: Program, state: TrainState) -> dict[str, np.ndarray]:
    """The parameters and moments of a state by path, their layers in the order of the model."""
    state = rearranged(state, np.argsort(made.lm.layer_order))
    leaves = tree.flatten({"params": state.params, "opt_state": state.opt_state})
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}


def assert_trained_alike(ours: Trained, theirs: Trained, tolerance: float) -> None:
    """Every metric, parameter and moment within `tolerance` of its largest value; padding of the vocabulary is zero."""
    assert ours.state.keys() == theirs.state.keys()
    for part in misses(ours, theirs):
        assert {name: miss for name, miss in part.items() if not miss <= tolerance} == {}


def misses(ours: Trained, theirs: Trained) -> list[dict[str, float]]:
    """By how much of its largest value each metric is off, and each parameter and moment."""
    parts = ((ours.metrics, theirs.metrics), (ours.state, theirs.state))
    return [{name: _miss(part[name], wanted[name]) for name in wanted} for part, wanted in parts]


def _miss(ours: np.ndarray, theirs: np.ndarray) -> float:
    padded = np.zeros_like(ours)
    padded[tuple(slice(size) for size in theirs.shape)] = theirs
    largest, difference = np.abs(theirs).max(), np.abs(ours - padded).max()
    return float(difference / largest if largest else difference)
