"""Maps over a model's parameters: a plain nested dict of arrays whose leaves have string paths.

Sharding, weight decay, freezing, adapters and conversion all choose leaves by path, with the functions here.
"""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, TypeVar

import jax

from jaxllm.core.errors import UserError, did_you_mean

Params = dict[str, Any]
Tree = Any
Leaves = Mapping[str, Any]
"""`{path: leaf}`: a tree laid flat, see `flatten`."""
V = TypeVar("V")


def paths(tree: Tree) -> Tree:
    """The same tree with every leaf replaced by its path, such as `"layers/attn/q/kernel"`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_string(path), tree)


def path_string(path: Sequence[Any]) -> str:
    """`"a/b/0"` for a key path of jax.tree_util."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """`{path: leaf}` in the tree's order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def match(tree: Tree, *globs: str, exclude: Sequence[str] = (), allow_unmatched: bool = False) -> Tree:
    """A mask: True for each leaf whose path matches one of `globs` and none of `exclude`.

    `*` also crosses `/`. Raises UserError for a glob that matches no leaf, unless `allow_unmatched`.
    """
    every = list(flatten(tree))
    for glob in (*globs, *exclude):
        if not allow_unmatched and not any(fnmatchcase(path, glob) for path in every):
            raise UserError(f"the pattern {glob!r} matches no parameter.{did_you_mean(glob, every)}")

    def chosen(path: str) -> bool:
        return any(fnmatchcase(path, g) for g in globs) and not any(fnmatchcase(path, g) for g in exclude)

    return jax.tree.map(chosen, paths(tree))


def first_match(tree: Tree, rules: Sequence[tuple[str, V]]) -> Tree:
    """For each leaf the value of the first rule `(glob, value)` whose glob matches its path.

    Raises UserError naming a leaf that no rule covers.
    """

    def value(path: str) -> V:
        for glob, chosen in rules:
            if fnmatchcase(path, glob):
                return chosen
        raise UserError(f"no rule covers the parameter {path!r}; add one, or a last rule '*'")

    return jax.tree.map(value, paths(tree))


def at(tree: Params, path: str) -> Any:
    """What is at `path`."""
    return reduce(lambda node, name: node[name], path.split("/"), tree)


def insert(tree: Params, leaves: Mapping[str, Any]) -> Params:
    """`tree` with `leaves`, by their paths, in place of those that it has there or beside them."""
    changed = dict(tree)
    for path, leaf in leaves.items():
        name, _, rest = path.partition("/")
        changed[name] = insert(changed.get(name, {}), {rest: leaf}) if rest else leaf
    return changed


def partition(tree: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """`(chosen, rest)`: two trees of the same shape, where a leaf that went to the other one is None."""
    chosen = jax.tree.map(lambda leaf, keep: leaf if keep else None, tree, mask)
    rest = jax.tree.map(lambda leaf, keep: None if keep else leaf, tree, mask)
    return chosen, rest


def combine(*trees: Tree) -> Tree:
    """The inverse of `partition`: at each place the first leaf that is not None."""

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """`jax.tree.map` whose function gets the leaf's path as a string first."""
    return jax.tree_util.tree_map_with_path(lambda path, *xs: f(path_string(path), *xs), tree, *rest)
