"""The fused step: equal to the ordinary one, in the memory that it promises."""

from functools import cache
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm import optim
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.models import FAMILIES, LM
from jaxllm.models.stack import scan
from jaxllm.objectives.base import CrossEntropy
from jaxllm.optim.build import OPTIMIZERS, build
from jaxllm.optim.config import OptimizerConfig
from jaxllm.optim.schedule_config import Constant
from jaxllm.runs.config import Config
from jaxllm.step.at_once import AtOnce
from jaxllm.step.batch import batch_shapes
from jaxllm.step.compile import CompiledStep, compile_step
from jaxllm.step.gradient import accumulated
from jaxllm.step.layer_by_layer import LayerByLayer
from jaxllm.step.leaf_update import LeafUpdate
from jaxllm.step.state import abstract_state
from jaxllm.step.update import make_step
from tests.support.families import draw_params, mesh_layout, small_lm
from tests.support.optimizers import section
from tests.support.small_runs import (
    MAX_GRAD_NORM,
    STEPS,
    Trained,
    assert_trained_alike,
    llama,
    program,
    ragged_batch,
    train,
)
from tests.support.tiers import representatives

# Two programs that mean the same, in float64, of each leaf's largest value after 20 steps (DESIGN, section 5).
TOLERANCE = 1e-10


def optimizer(name: str) -> OptimizerConfig:
    """A fresh AdamW's first update is the sign of the gradient, and a small eps lets the last bits of the smallest
    entries grow."""
    return section(name, **({"eps": 1e-3} if name == "adamw" else {}))


@cache
def ordinary(name: str, model: tuple[tuple[str, Any], ...], how: tuple[tuple[str, Any], ...]) -> Trained:
    """On one device, the whole batch at once."""
    return train(llama(**dict(model)), optimizer=optimizer(name), dtype="float64", **dict(how))


def check(name: str, model: dict[str, Any], sizes: dict[str, int], micro_batches: int, **how: Any) -> None:
    with jax.enable_x64(True):
        layout = mesh_layout(**sizes) if sizes else Layout.single()
        options = dict(optimizer=optimizer(name), micro_batches=micro_batches, dtype="float64", fused=True)
        ours = train(llama(**model), layout, **options, **how)
        theirs = ordinary(name, tuple(model.items()), tuple(how.items()))
        assert_trained_alike(ours, theirs, TOLERANCE)


TIED, BIASED = dict(tie_word_embeddings=True), dict(attention_bias=True, num_hidden_layers=3)
NO_CLIP = dict(max_grad_norm=None)
# The exported optimizers, both kinds of head, each way to clip, accumulation and each axis of the mesh, pair by pair.
PAIRS = [
    ("lomo", {}, {}, 1, {}),
    ("adamw", TIED, dict(data=2, tensor=2), 4, {}),
    ("adan", BIASED, dict(fsdp=4), 1, NO_CLIP),
    ("adalomo", TIED, dict(fsdp=2, tensor=2), 4, NO_CLIP),
    ("lion", {}, {}, 4, dict(max_grad_norm=None, max_grad_value=1e-2)),
    ("lomo", TIED, dict(fsdp=2, tensor=2), 4, dict(dropout=0.2)),
]


@pytest.mark.parametrize(("name", "model", "sizes", "micro_batches", "how"), PAIRS, ids=str)
def test_equals_the_ordinary_step(name, model, sizes, micro_batches, how):
    check(name, model, sizes, micro_batches, **how)


MIXED = dict(data=2, fsdp=2, tensor=2)


CLIPS = {"norm": {}, "not": NO_CLIP, "value": dict(max_grad_value=1e-2)}
EXPORTED = list(dict.fromkeys(name for name, *_ in PAIRS))
CLIPPED = [pytest.param(name, how, id=f"{name}-{clip}") for name in EXPORTED for clip, how in CLIPS.items()]


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "how"), representatives(CLIPPED, ["lomo-norm", "adamw-value", "adan-not", "adalomo-norm", "lion-norm"])
)
def test_every_way_to_clip_on_a_mixed_mesh(name, how):
    check(name, TIED if name in ("lomo", "adan") else {}, MIXED, 4, **how)


FUSED = [name for name in OPTIMIZERS if not OPTIMIZERS[name].needs_whole_model]
WRAPPED = [name for name in FUSED if name not in {name for name, *_ in PAIRS}]


@pytest.mark.full
@pytest.mark.parametrize("name", representatives(WRAPPED, ["adafactor", "muon", "galore", "schedule_free_adamw"]))
def test_every_other_optimizer_on_a_mixed_mesh(name):
    # No mesh pads this vocabulary: where Adagrad's sum is of padding it is what it began with, and not 0.
    check(name, {**TIED, "vocab_size": 104}, MIXED, 2)


@pytest.mark.parametrize("name", WRAPPED)
def test_every_other_optimizer_leaf_by_leaf(name):
    """Two updates of each layer's leaves in turn are those of the whole model, the state's included."""
    lm = small_lm(llama(**TIED), dtype="float64")
    with jax.enable_x64(True):
        tx, _ = build(section(name), STEPS)
        update, params = LeafUpdate(lm, tx), draw_params(lm)
        grads = jax.tree.map(jnp.cos, params)

        def one_by_one(params, state):
            slots, common = update.split(params, state)
            leaves, of_leaves, moved, kept = tree.flatten(params), tree.flatten(grads), {}, {}
            for path, leaf in leaves.items():
                rows = leaf.shape[0] if path.startswith("layers/") else 1
                parts = []
                for i in range(rows):
                    row = lambda a, i=i, rows=rows: a[i : i + 1] if rows > 1 else a  # noqa: E731
                    args = jax.tree.map(row, (leaf, of_leaves[path], slots[path]))
                    parts.append(update(*({path: arg} for arg in args), common)[:2])
                moved[path], kept[path] = jax.tree.map(
                    lambda *rows: jnp.concatenate(rows) if rows[1:] else rows[0],
                    *[(new[path], slot[path]) for new, slot in parts],
                )
            return update.nested(moved), update.join(params, kept, update({}, {}, {}, common)[2])

        def whole(params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        @jax.jit
        def both(params):
            start = (params, tx.init(params))
            return one_by_one(*one_by_one(*start)), whole(*whole(*start))

        ours, theirs = both(params)
        chex.assert_trees_all_close(ours, theirs, rtol=TOLERANCE, atol=1e-12)


@pytest.mark.full
def test_the_objective_and_frozen_leaves():
    how = dict(objective=CrossEntropy(label_smoothing=0.1, z_loss=1e-2), frozen=("embed/*", "*/q/kernel"))
    check("adamw", {}, dict(fsdp=2), 4, **how)


@pytest.mark.full
def test_only_the_layers_train():
    check("adamw", {}, {}, 1, frozen=("embed/*", "head/*", "norm/*"))


def test_all_optimizers_are_in_the_table():
    assert {name for name, *_ in PAIRS} == {name for name in optim.__all__ if name in FUSED}


@cache
def bfloat16_programs(stochastic_rounding: bool = False) -> list[Any]:
    options = dict(optimizer=section("adamw"), dtype="bfloat16", micro_batches=2)
    return [
        program(llama(), fused=fused, stochastic_rounding=stochastic_rounding, **options) for fused in (False, True)
    ]


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_bfloat16_parameters_keep_float32_state(stochastic_rounding):
    """A step from the same parameters moves each to the same bfloat16 number, or to a neighbour."""
    ordinary, fused = (
        made.compiled.run(made.start(), made.place(ragged_batch(0), 2))[0]
        for made in bfloat16_programs(stochastic_rounding)
    )
    ours, theirs = tree.flatten(fused.params), tree.flatten(ordinary.params)
    for path, leaf in ours.items():
        assert leaf.dtype == jnp.bfloat16
        a, b = (np.asarray(x, np.float32) for x in (leaf, theirs[path]))
        # 1 ulp of bfloat16 is at most 2^-7 of a value; gradients of two programs differ by as much here and there.
        np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=1e-3)
        assert (a == b).mean() > 0.9, path
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(fused.opt_state) if leaf.ndim}
    assert kinds == {"float32"}


@pytest.mark.parametrize("max_grad_norm", [MAX_GRAD_NORM, None])
def test_a_loss_that_is_not_finite_changes_nothing(max_grad_norm):
    made = program(llama(), fused=True, max_grad_norm=max_grad_norm)
    batch = ragged_batch(0)
    mask = batch["loss_mask"].copy()
    mask[np.nonzero(mask)[0][0], np.nonzero(mask)[1][0]] = np.nan
    before = jax.tree.map(np.array, made.start())
    after, metrics = made.compiled.run(made.start(), made.place({**batch, "loss_mask": mask}))
    assert metrics["bad"] == 1
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), before, after)
    assert all(jax.tree.leaves(same)), same
    after, metrics = made.compiled.run(made.start(), made.place(batch))
    assert metrics["bad"] == 0
    assert after.step == 1


# Memory

DEEP = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=4, vocab_size=512)


def compiled(
    name: str,
    *,
    fused: bool,
    micro_batches: int = 1,
    max_grad_norm: float | None = None,
    layout: Layout | None = None,
) -> CompiledStep:
    """The step of 24 layers with few tokens, so that what it holds beside its arguments is weights."""
    config = FAMILIES["llama"].config(**DEEP)
    lm = LM(FAMILIES["llama"], config, layout or Layout.single())
    constant = Constant(type="constant", warmup=0)
    tx, schedule = build(OPTIMIZERS[name](type=name, learning_rate=1e-3, schedule=constant), STEPS)
    state = abstract_state(lm.abstract(), jax.tree.map(lambda _: True, lm.abstract()), tx, lm.layout)
    if fused:
        step = make_step(lm, tx, schedule, backward=LayerByLayer(), max_grad_norm=max_grad_norm)
    else:
        step = make_step(lm, tx, schedule, backward=AtOnce(accumulated(scan("full"))), max_grad_norm=max_grad_norm)
    return compile_step(step, state, batch_shapes((micro_batches, lm.layout.size("batch"), 64), lm.layout), lm.layout)


def weights(*parts: str) -> float:
    abstract = LM(FAMILIES["llama"], FAMILIES["llama"].config(**DEEP), Layout.single()).abstract()
    return sum(leaf.size * 4 for part in parts for leaf in jax.tree.leaves(abstract[part]))


def budget(micro_batches: int = 1) -> float:
    """In bytes: the layers' inputs, three layers, the loss chunk, the gradients of embedding and head, and one layer's
    activations in a micro-batch (four of the block's width and four of its feed-forward layer's)."""
    width, inner = DEEP["hidden_size"], DEEP["intermediate_size"]
    tokens = 64 * 4
    inputs = DEEP["num_hidden_layers"] * tokens * width * micro_batches
    activations = 4 * tokens * (width + inner)
    return inputs + 3 * weights("layers") / 24 + tokens * DEEP["vocab_size"] + weights("embed", "head") + activations


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_temporary_memory_is_a_few_layers(name):
    fused = compiled(name, fused=True)
    ordinary = compiled(name, fused=False)
    assert fused.temp_bytes <= budget()
    assert ordinary.temp_bytes > weights("layers") > 4 * budget()


@pytest.mark.optimized
def test_two_passes_and_accumulation_hold_no_more():
    assert compiled("lomo", fused=True, max_grad_norm=1.0).temp_bytes <= budget()
    assert compiled("lomo", fused=True, micro_batches=4).temp_bytes <= budget(4)


@pytest.mark.full
@pytest.mark.optimized
@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_sharded_layers_are_gathered_one_by_one(name):
    """Of 24 layers in eight shards a device holds a gathered one and its gradient; the budget has room for three."""
    fused = compiled(name, fused=True, layout=mesh_layout(fsdp=8))
    assert fused.argument_bytes < 1.1 * weights("layers", "embed", "head") / 8
    assert fused.temp_bytes <= budget()


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["adalomo", "adamw"])
def test_every_byte_of_the_state_is_reused(name):
    memory: Any = compiled(name, fused=True).run.memory_analysis()
    scalars = 64 * 4  # the metrics
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes <= scalars + 8 * 200  # and a table of pointers


# Config


def config(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "output_dir": "run",
        "model": {"path": "model"},
        "data": {"sources": [{"path": "text.jsonl"}], "seq_len": 128},
        "optim": {"type": "adalomo", "learning_rate": 1e-3},
        "train": {"steps": 10, "batch_size": 32, "update": "fused"},
    }
    values["train"] |= changes
    return Config.model_validate(values)


def test_float16_is_refused():
    assert config().train.update == "fused"
    with pytest.raises((ValueError, UserError), match="before all gradients are known to be finite"):
        config(compute_dtype="float16")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if OPTIMIZERS[name].needs_whole_model])
def test_an_optimizer_that_needs_the_whole_model_is_refused_by_name(name):
    values = config().model_dump()
    values["optim"] = {"type": name, "learning_rate": 1e-3}
    with pytest.raises((ValueError, UserError), match=f"optim.type {name} .*; set update to ordinary"):
        Config.model_validate(values)
