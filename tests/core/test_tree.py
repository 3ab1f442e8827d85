"""Maps over parameter trees by path."""

import jax
import jax.numpy as jnp
import pytest

from jaxllm.core import tree
from jaxllm.core.errors import UserError

PARAMS = {
    "embed": {"table": 1},
    "layers": {"attn": {"q": {"kernel": 2, "bias": 3}}, "norm": {"scale": 4}},
    "norm": {"scale": 5},
}


def test_paths_name_every_leaf():
    assert tree.flatten(PARAMS) == {
        "embed/table": 1,
        "layers/attn/q/bias": 3,
        "layers/attn/q/kernel": 2,
        "layers/norm/scale": 4,
        "norm/scale": 5,
    }
    assert tree.paths(PARAMS)["layers"]["attn"]["q"]["kernel"] == "layers/attn/q/kernel"
    assert tree.flatten({"a": [1, {"b": 2}]}) == {"a/0": 1, "a/1/b": 2}


def test_match_chooses_by_globs_that_cross_levels():
    def chosen(*globs, **options):
        return [path for path, on in tree.flatten(tree.match(PARAMS, *globs, **options)).items() if on]

    assert chosen("layers/*") == ["layers/attn/q/bias", "layers/attn/q/kernel", "layers/norm/scale"]
    assert chosen("*", exclude=["*scale", "*/bias"]) == ["embed/table", "layers/attn/q/kernel"]
    assert chosen("norm/scale", "*table") == ["embed/table", "norm/scale"]
    assert chosen() == []


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match=r"'embed/tabel' matches no parameter\. Did you mean 'embed/table'"):
        tree.match(PARAMS, "embed/tabel")
    with pytest.raises(UserError, match="'head/kernel'"):
        tree.match(PARAMS, "*", exclude=["head/kernel"])
    assert not any(jax.tree.leaves(tree.match(PARAMS, "head/*", allow_unmatched=True)))


def test_the_first_rule_that_matches_counts():
    rules = [("*/bias", "none"), ("layers/*", "some"), ("*", "all")]
    values = tree.flatten(tree.first_match(PARAMS, rules))
    assert values == {
        "embed/table": "all",
        "layers/attn/q/bias": "none",
        "layers/attn/q/kernel": "some",
        "layers/norm/scale": "some",
        "norm/scale": "all",
    }
    with pytest.raises(UserError, match="'embed/table'"):
        tree.first_match(PARAMS, rules[:2])


def test_partition_and_combine_are_inverse():
    mask = tree.match(PARAMS, "layers/*")
    chosen, rest = tree.partition(PARAMS, mask)
    assert chosen["embed"]["table"] is None
    assert rest["layers"]["norm"]["scale"] is None
    assert len(jax.tree.leaves(chosen)) == 3
    assert len(jax.tree.leaves(rest)) == 2
    assert tree.combine(chosen, rest) == tree.combine(rest, chosen) == PARAMS


def test_partition_lives_inside_jit():
    params = jax.tree.map(jnp.float32, PARAMS)

    @jax.jit
    def double_the_norm(params):
        chosen, rest = tree.partition(params, tree.match(params, "norm/*"))
        return tree.combine(jax.tree.map(lambda x: 2 * x, chosen), rest)

    doubled = tree.flatten(double_the_norm(params))
    assert {path: float(x) for path, x in doubled.items()} == {**tree.flatten(PARAMS), "norm/scale": 10}


def test_map_with_path():
    assert tree.map_with_path(lambda path, a, b: (path, a + b), {"x": 1}, {"x": 2}) == {"x": ("x", 3)}
