"""The optimizer's state in the host's memory, and a part of it at a time on the device."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from jaxllm.core.host_memory import to_device, to_host, waits_on_host

State = TypeVar("State")
Rest = TypeVar("Rest")


def in_pieces(update: Callable[[State], tuple[State, Rest]], state: State) -> tuple[State, Rest]:
    """`update(state)`, of a state whose leaves may lie in the host's memory, where the new ones then lie too.

    The device has few of them at a time: first those are brought that the first leaf of the rest follows from (say, the
    moments of a parameter), and when all else that `update` uses is there; then those of the second leaf, when the
    first ones are back; and so on. A rule that looks at the whole state for one leaf has it all there.
    """
    leaves, structure = jax.tree.flatten(state)
    on_host = [waits_on_host(leaf) for leaf in leaves]
    if not any(on_host):
        return update(state)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    traced, result = jax.make_jaxpr(update, return_shape=True)(structure.unflatten(shapes))
    program, equations = traced.jaxpr, list(traced.jaxpr.eqns)
    values = dict(zip(program.constvars, traced.consts, strict=True))
    values |= {var: leaf for var, leaf, waits in zip(program.invars, leaves, on_host, strict=True) if not waits}
    results: dict[int, Any] = {}

    awaited: list[tuple[dict[Any, Any], Any]] = [(values, var) for var in values]
    for piece in _pieces(program, {place for place, waits in enumerate(on_host) if waits}):
        # Without the barrier the compiler might bring all of the state when the step begins, beside the activations.
        before, brought = jax.lax.optimization_barrier(
            ([held[key] for held, key in awaited], [leaves[place] for place in piece])
        )
        for (held, key), value in zip(awaited, before, strict=True):
            held[key] = value
        values |= {program.invars[i]: to_device(leaf) for i, leaf in zip(piece, brought, strict=True)}
        equations = _evaluate(equations, values)
        awaited = []
        for place, var in enumerate(program.outvars):
            if place not in results and (isinstance(var, Literal) or var in values):
                value = var.val if isinstance(var, Literal) else values[var]
                results[place] = to_host(value) if place < len(leaves) and on_host[place] else value
                awaited.append((results, place))
    return jax.tree.unflatten(jax.tree.structure(result), [results[place] for place in range(len(results))])


def _pieces(program: Jaxpr, waiting: Iterable[int]) -> Iterator[list[int]]:
    """The places among the inputs, out of `waiting`, that each output follows from and none before it does: first of
    the outputs beyond the inputs' number, then of the others."""
    needs: dict[Var, set[int]] = {program.invars[place]: {place} for place in waiting}
    for equation in program.eqns:
        sources = set().union(*(needs.get(var, ()) for var in _variables(equation.invars)))
        needs |= dict.fromkeys(equation.outvars, sources)
    count, brought = len(program.invars), set()
    for out in _variables([*program.outvars[count:], *program.outvars[:count]]):
        if piece := needs.get(out, set()) - brought:
            brought |= piece
            yield sorted(piece)


def _evaluate(equations: Iterable[JaxprEqn], values: dict[Var, Any]) -> list[JaxprEqn]:
    """Adds to `values` what follows from them. Returns the equations that lack an input."""
    left = []
    for equation in equations:
        if not all(var in values for var in _variables(equation.invars)):
            left.append(equation)
            continue
        primitive = equation.primitive
        inputs = [atom.val if isinstance(atom, Literal) else values[atom] for atom in equation.invars]
        with equation.ctx.manager:
            found = primitive.bind(*inputs, **primitive.get_bind_params(equation.params))
        values |= zip(equation.outvars, found if primitive.multiple_results else [found], strict=True)
    return left


def _variables(atoms: Iterable[Any]) -> list[Var]:
    return list(dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal)))
