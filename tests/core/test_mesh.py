"""Meshes and layout rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from pydantic import ValidationError

from jaxllm.core.errors import UserError
from jaxllm.core.mesh import AXES, DEFAULT_RULES, Layout, MeshConfig, make_mesh


def layout(**sizes):
    rules = sizes.pop("rules", {})
    return Layout.of(MeshConfig(**{"fsdp": 1, **sizes}, rules=rules), jax.devices()[: np.prod(list(sizes.values()))])


def test_one_axis_may_be_the_rest():
    assert dict(make_mesh(MeshConfig()).shape) == {"pipeline": 1, "data": 1, "fsdp": 8, "context": 1, "tensor": 1}
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=1, tensor=2)).shape)["data"] == 4
    assert tuple(make_mesh(MeshConfig()).axis_names) == AXES


@pytest.mark.parametrize(
    ("sizes", "remedy"),
    [
        ({"fsdp": 3}, "Set one axis of `mesh` to -1"),
        ({"fsdp": 1}, "Set one axis of `mesh` to -1"),
        ({"data": 3}, "beside the -1 multiply to 3, which does not divide 8"),
        ({"tensor": 16}, "beside the -1 multiply to 16, which does not divide 8"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, remedy):
    with pytest.raises(UserError) as error:
        make_mesh(MeshConfig(**sizes))
    assert "8 device(s)" in str(error.value)
    assert remedy in str(error.value)
    assert all(f"{axis} {size}" in str(error.value) for axis, size in sizes.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 0}, "mesh.data must be a positive number of devices"),
        ({"data": -2}, "mesh.data"),
        ({"data": -1}, "only one mesh axis may be -1"),
        ({"rules": {"embedd": ["fsdp"]}}, "Did you mean 'embed'"),
        ({"rules": {"embed": ["fdsp"]}}, "Did you mean 'fsdp'"),
        ({"tensr": 2}, "tensr"),
        (
            {"context": 2, "rules": {"act_length": ["tensor"]}},
            r"mesh.rules.act_length is \['tensor'\], .* set it to \['context', 'tensor'\]",
        ),
    ],
    ids=str,
)
def test_a_wrong_mesh_section_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        MeshConfig(**values)


def test_specs_follow_the_rules():
    mesh = layout(data=2, fsdp=2, tensor=2)
    assert mesh.spec(("layers", "embed", "mlp"), (3, 8, 8)) == P(None, "fsdp", "tensor")
    assert mesh.spec(("batch", "act_length", "act_embed")) == P(("data", "fsdp"), None, None)
    assert mesh.spec(("vocab", "vocab_embed"), (8, 3)) == P(("fsdp", "tensor"), None)
    assert mesh.spec((None, "heads"), (3, 4)) == P(None, "tensor")
    assert layout(tensor=2).spec(("batch", "embed")) == P(None, None), "axes of size 1 split nothing"
    assert mesh.without("data").spec(("batch", "mlp")) == P("fsdp", "tensor")
    assert (mesh.size("vocab"), mesh.size("norm"), layout(tensor=8).size("vocab")) == (4, 1, 8)


def test_the_length_and_the_parameters_are_split_over_context():
    mesh = layout(fsdp=2, context=2, tensor=2)
    assert mesh.spec(("batch", "act_length", "act_embed"), (2, 4, 3)) == P("fsdp", "context", None)
    assert mesh.spec(("embed", "mlp"), (8, 8)) == P(("fsdp", "context"), "tensor")
    both = layout(context=2, tensor=2, rules={"act_length": ["context", "tensor"]})
    assert both.spec(("batch", "act_length", "act_embed")) == P(None, ("context", "tensor"), None)


def test_rules_of_the_config_override_single_axes():
    changed = layout(fsdp=2, tensor=2, rules={"embed": ["fsdp", "tensor"], "mlp": []})
    assert changed.spec(("embed", "mlp"), (8, 3)) == P(("fsdp", "tensor"), None)
    assert {**changed.rules, "embed": ("fsdp", "context"), "mlp": ("tensor",)} == DEFAULT_RULES
    assert changed.replace(mlp=("tensor",)).rules["mlp"] == ("tensor",)


@pytest.mark.parametrize(
    ("axes", "shape", "words"),
    [
        (("layers", "embd"), (2, 8), ["layers/x", "'embd'", "Did you mean 'embed'"]),
        (("heads", "mlp"), (8, 8), ["layers/x", "'heads' and 'mlp'", "'tensor'", "mesh.rules"]),
        (("embed", "mlp"), (8, 9), ["layers/x", "dimension 1 (mlp) of size 9", "tensor 2", "mesh.rules.mlp"]),
        (("batch", None), (6, 1), ["dimension 0 (batch) of size 6", "data 2 × fsdp 2 = 4"]),
        (("embed",), (8, 8), ["layers/x", "1 axis names", "(8, 8)"]),
    ],
    ids=str,
)
def test_a_spec_that_cannot_be_is_refused_by_name(axes, shape, words):
    with pytest.raises(UserError) as error:
        layout(data=2, fsdp=2, tensor=2).spec(axes, shape, "layers/x")
    assert all(word in str(error.value) for word in words), str(error.value)


def test_shardings_name_the_leaf_that_does_not_fit():
    abstract = {"attn": {"q": jax.ShapeDtypeStruct((6, 8), jnp.float32)}}
    with pytest.raises(UserError, match=r"^attn/q: "):
        layout(fsdp=4, tensor=2).shardings({"attn": {"q": ("embed", "heads")}}, abstract)


def test_constrain_lays_out_an_array_inside_jit():
    mesh = layout(data=2, tensor=4)
    x = jax.jit(lambda: mesh.constrain(jnp.zeros((2, 4)), "batch", "act_mlp"))()
    assert x.sharding.shard_shape(x.shape) == (1, 1)
    assert mesh.replicated.shard_shape((2, 4)) == (2, 4)
    assert mesh.sharding("batch", None).shard_shape((2, 4)) == (1, 4)


def test_one_device_is_a_mesh():
    single = Layout.single(jax.devices()[3])
    assert dict(single.mesh.shape) == dict.fromkeys(AXES, 1)
    x = jax.jit(lambda: single.constrain(jnp.zeros(3), "mlp"))()
    assert x.devices() == {jax.devices()[3]}
    assert "1 × cpu" in str(single)


def test_one_process_holds_every_row():
    assert layout(data=2, fsdp=2, tensor=2).local("batch", 12) == slice(0, 12)
    assert Layout.single().local("batch", 3) == slice(0, 3)
