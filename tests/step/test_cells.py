"""Selection × backward × update: the cells that no step was written for are equal to one device, too.

Each cell is compared with the plain form of the same selection: one device, one micro-batch, gradients as one tree.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core import tree
from jaxllm.models.stack import NamedTensors
from jaxllm.runs.config import Config
from jaxllm.step.selection import Draws
from tests.support.families import mesh_layout
from tests.support.optimizers import section
from tests.support.small_runs import Trained, assert_trained_alike, llama, misses, program, ragged_batch, train

# Two programs that mean the same, in float64, of each leaf's largest value (DESIGN, section 5).
TOLERANCE = 1e-10
MODEL, STEPS = dict(num_hidden_layers=4), 7
PIPED, CHUNKS = dict(pipeline=2, data=2, tensor=2), dict(pipeline=2, fsdp=2)
SHARDED = dict(data=2, fsdp=2, tensor=2)
FUSED: dict[str, Any] = dict(fused=True)
NAMED = NamedTensors(save=("attn_q", "mlp_gate"), offload=("mlp_up",))


@cache
def plain(selection: str | None, name: str, norm: float | None) -> Trained:
    lisa = None if selection is None else Draws(2, 3, 1, selection)  # pyright: ignore[reportArgumentType]
    how = dict(steps=STEPS, optimizer=section(name), dtype="float64", max_grad_norm=norm)
    return train(llama(**MODEL), lisa=lisa, **how)


def check(selection: str | None, sizes: dict[str, int], name: str = "adamw", norm: float | None = 4.0, **how: Any):
    lisa = None if selection is None else Draws(2, 3, 1, selection)  # pyright: ignore[reportArgumentType]
    with jax.enable_x64(True):
        layout = mesh_layout(**sizes) if sizes else None
        how = dict(steps=STEPS, optimizer=section(name), dtype="float64", max_grad_norm=norm, **how)
        ours = train(llama(**MODEL), layout, lisa=lisa, **how)
        assert_trained_alike(ours, plain(selection, name, norm), TOLERANCE)


FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("selection", "sizes", "how"),
    [
        # LISA, fused, on a pipeline; and chunks of stages with either.
        ("reset_body", PIPED, FUSED | dict(micro_batches=4)),
        pytest.param("keep", PIPED, FUSED | dict(micro_batches=4, norm=None), marks=FULL),
        pytest.param("reset_all", CHUNKS, FUSED | dict(micro_batches=2, virtual_stages=2), marks=FULL),
        (None, CHUNKS, FUSED | dict(micro_batches=4, virtual_stages=2)),
        pytest.param(None, PIPED, FUSED | dict(micro_batches=4, virtual_stages=2, norm=None, name="lomo"), marks=FULL),
        ("reset_body", CHUNKS, dict(micro_batches=4, virtual_stages=2, remat="full")),
        pytest.param("keep", PIPED, dict(micro_batches=4, virtual_stages=2), marks=FULL),
        # The state in parts, on the host, or both.
        ("reset_body", SHARDED, dict(scattered=True, micro_batches=2)),
        pytest.param("keep", PIPED, dict(scattered=True, offloaded=True, micro_batches=2), marks=FULL),
        (None, SHARDED, FUSED | dict(scattered=True, offloaded=True, micro_batches=2)),
        pytest.param("reset_all", SHARDED, FUSED | dict(scattered=True, offloaded=True), marks=FULL),
        pytest.param(None, PIPED, FUSED | dict(scattered=True, offloaded=True, micro_batches=2), marks=FULL),
        # What the backward pass keeps of a layer.
        ("reset_body", {}, dict(remat=NAMED, unroll=2, micro_batches=2)),
        (None, dict(data=2, fsdp=2), FUSED | dict(remat="dots", micro_batches=2)),
        pytest.param("keep", {}, FUSED | dict(remat="offload_dots", norm=None), marks=FULL),
    ],
    ids=str,
)
def test_equals_one_device(selection, sizes, how):
    check(selection, sizes, **how)


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        (dict(data=4, fsdp=2), FUSED),
        (dict(data=2, fsdp=2), dict(lisa=Draws(2, 3, 1), micro_batches=2)),
        pytest.param(PIPED, FUSED | dict(micro_batches=2), marks=FULL),
        pytest.param(PIPED, dict(lisa=Draws(2, 3, 1), micro_batches=2), marks=FULL),
    ],
    ids=str,
)
def test_gradients_summed_in_bfloat16(sizes, how):
    """They are off by its rounding, and the losses are not."""
    options: dict[str, Any] = dict(steps=1, max_grad_norm=None, optimizer=section("sgd"))
    ours = train(llama(**MODEL), mesh_layout(**sizes), reduce_dtype="bfloat16", **options, **how)
    exact, _ = misses(ours, train(llama(**MODEL), **options, lisa=how.get("lisa")))
    assert exact["loss"] < 1e-6
    norms = {name: miss for name, miss in exact.items() if name.startswith("grad_norm/")}
    assert all(miss < 2**-6 for miss in norms.values())
    assert max(norms.values()) > 2**-14


def test_float16_gradients_of_sampled_layers_are_scaled():
    """All layers kept, it is the ordinary step; and an overflow halves the scale and changes nothing."""
    how: dict[str, Any] = dict(steps=4, compute_dtype="float16", optimizer=section("adamw"))
    ours, whole = (train(llama(**MODEL), lisa=lisa, **how) for lisa in (Draws(4, 3, 0, "keep"), None))
    np.testing.assert_allclose(ours.metrics["loss"], whole.metrics["loss"], rtol=2e-3)
    np.testing.assert_array_equal(ours.metrics["loss_scale"], whole.metrics["loss_scale"])

    made = program(llama(**MODEL), lisa=Draws(2, 3, 1), compute_dtype="float16")
    state = made.start()
    state = state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(2.0**24)))
    before = {path: np.array(leaf) for path, leaf in tree.flatten(state.params).items()}
    after, metrics = made.compiled.run(state, made.place(ragged_batch(0)))
    assert (metrics["overflow"], metrics["bad"]) == (1, 0)
    assert after.loss_scale.scale == 2.0**23
    assert all(
        np.asarray(leaf).tobytes() == before[path].tobytes() for path, leaf in tree.flatten(after.params).items()
    )


@pytest.mark.parametrize(
    ("how", "leading"), [(dict(lisa=Draws(2, 3, 1)), 2), (dict(fused=True), 1)], ids=["lisa", "fused"]
)
def test_each_replica_has_a_part_of_every_layers_state(how, leading):
    made = program(llama(**MODEL), mesh_layout(data=2, fsdp=2), scattered=True, offloaded=True, **how)
    state: Any = made.start().opt_state
    leaves = tree.flatten(state.layers if "lisa" in how else state)
    moments = {path: leaf for path, leaf in leaves.items() if "/nu/layers" in path and "kernel" in path}
    assert moments
    for path, leaf in moments.items():
        spec = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
        assert not any(spec[:leading]), path
        assert leaf.sharding.memory_kind == "pinned_host"
        assert 4 * leaf.addressable_shards[0].data.size == leaf.size, path  # data × fsdp


@pytest.mark.full
@pytest.mark.optimized
def test_a_fused_stage_holds_the_gradient_of_one_drawn_layer():
    """Four more layers of 32 that train: their inputs and the gradients of their outputs, and no gradients."""
    sizes = dict(hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=32)
    layer, activation = 4 * (4 * 128**2 + 3 * 128 * 512), 4 * 16 * 128 * 4

    def temporaries(active: int, fused: bool) -> int:
        how: dict[str, Any] = dict(micro_batches=4, shape=(16, 16), optimizer=section("lomo"), max_grad_norm=None)
        config = llama(num_hidden_layers=32, **sizes)
        return program(
            config, mesh_layout(pipeline=4), lisa=Draws(active, 20, 0), fused=fused, **how
        ).compiled.temp_bytes

    assert temporaries(8, True) - temporaries(4, True) <= 4 * 4 * 2 * activation + layer / 8
    assert temporaries(8, False) - temporaries(4, False) > 2 * 4 * layer


SECTIONS: dict[str, Any] = {
    "output_dir": "run",
    "model": {"path": "model"},
    "data": {"sources": [{"path": "text.jsonl"}], "seq_len": 128},
    "optim": {"type": "adamw", "learning_rate": 1e-3},
}
LISA, PIPELINE = {"peft": {"type": "lisa"}}, {"mesh": {"pipeline": 2}}


@pytest.mark.parametrize(
    ("train", "more"),
    [
        *(
            (setting, LISA)
            for setting in (
                dict(compute_dtype="float16"),
                dict(reduce_dtype="bfloat16"),
                dict(shard_optimizer=True),
                dict(offload_optimizer=True),
                dict(remat="dots"),
                dict(unroll=2),
            )
        ),
        *(
            (dict(update="fused", **setting), {})
            for setting in (
                dict(offload_optimizer=True),
                dict(shard_optimizer=True),
                dict(reduce_dtype="bfloat16"),
                dict(remat="dots"),
                dict(unroll=2),
            )
        ),
        (dict(update="fused"), LISA | PIPELINE),
        (dict(update="fused", virtual_stages=2), PIPELINE),
        (dict(virtual_stages=2), LISA | PIPELINE),
        (dict(update="fused", virtual_stages=2), LISA | PIPELINE),
    ],
    ids=str,
)
def test_a_config_may_ask_for_it(train, more):
    Config.model_validate({**SECTIONS, "train": {"steps": 10, "batch_size": 32, **train}, **more})
