"""A model taken apart at its layers, for walks that see one layer at a time, over all micro-batches of a batch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core import tree
from jaxllm.core.tree import Leaves, Params
from jaxllm.models.lm import LM
from jaxllm.models.stack import Remat, rematerialised
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch, sum_micro, trained_tokens
from jaxllm.step.reduction import Replicas
from jaxllm.step.state import TrainState, over_replicas

INDEX = "index"
"""Beside the parameters of the layers: which of them each is."""


def in_embedding(name: str) -> bool:
    return name.startswith("embed/")


def layers_and_rest(leaves: Leaves) -> tuple[dict[str, Any], dict[str, Any]]:
    layers = {name: leaf for name, leaf in leaves.items() if name.startswith("layers/")}
    return layers, {name: leaf for name, leaf in leaves.items() if name not in layers}


@dataclass(frozen=True)
class How:
    """How gradients are computed and summed by walks over one layer at a time.

    remat: what a layer keeps for its backward pass; none and full: its input, from which it is computed again. unroll:
    how many layers the loop of the forward pass does at once. dtype: of what replicas send and add, see `Replicas`.
    scattered: each replica has a part of the gradients, see `over_replicas`.
    """

    remat: Remat = "none"
    unroll: int | bool = 1
    dtype: str | None = None
    scattered: bool = False


RECOMPUTED = How()


@dataclass(frozen=True)
class Layerwise:
    """A model around its layers, over all micro-batches of a batch.

    Activations are `[M, B, T, D]`, or where replicas sum gradients of their own `[R, M, B / R, T, D]`, and so lies the
    `batch`. lm: the model as one replica computes with it. rest: all parameters but the layers'; trainable: which of
    them train. trained: the trained tokens of the whole batch. factor: of the objective that is differentiated. of_aux:
    of each micro-batch, `[M, …]`, the derivative of the objective for the statistics of its layers, once it is known.
    """

    lm: LM
    how: How
    replicas: Replicas
    rest: Leaves
    trainable: Iterable[str]
    batch: dict[str, jax.Array]
    objective: Objective
    trained: jax.Array
    factor: Any
    of_aux: Leaves = field(default_factory=dict)

    @staticmethod
    def of(lm: LM, how: How, state: TrainState, batch: Batch, objective: Objective, factor: Any = 1) -> "Layerwise":
        replicas = Replicas.of(lm, batch["tokens"].shape[0], how.dtype)
        rest, frozen = (layers_and_rest(tree.flatten(half))[1] for half in (state.params, state.frozen))
        args = ({**frozen, **rest}, rest.keys(), replicas.split(batch), objective, trained_tokens(batch), factor)
        return Layerwise(replicas.model(lm), how, replicas, *args)

    def nested(self, leaves: Leaves) -> Params:
        """The parameter tree that has `leaves`, and None elsewhere."""
        return jax.tree.map(leaves.get, tree.paths(self.lm.abstract()))

    # One layer, see `sweep.Layers`

    def forward(self, trainable: Leaves, frozen: Leaves, x: jax.Array) -> tuple[jax.Array, Any, Leaves]:
        """`(the layer's output, what is kept for its backward pass, its statistics [M, …])`."""

        def of_micro(x: jax.Array, micro: Batch) -> Any:
            if self._recomputes:
                y, aux = self._block(trainable, frozen, micro, x)
                return (), (y, x, aux)
            (y, aux), vjp = jax.vjp(rematerialised(self._block, self.how.remat), trainable, frozen, micro, x)
            vjp.args_res = [None, None, None, x]  # weights and batch are there in the backward pass too
            return (), (y, vjp, aux)

        return self._over_batch(of_micro, x, self.batch)[1]

    def gradients(self, trainable: Leaves, frozen: Leaves, kept: Any, dy: jax.Array) -> tuple[Leaves, jax.Array]:
        def of_micro(kept: Any, dy: tuple[jax.Array, Leaves], micro: Batch) -> Any:
            if not self._recomputes:
                grads, *_, dx = self._pulled(trainable, frozen, kept, micro, dy)
                return grads, dx
            _, vjp = jax.vjp(lambda p, x: self._block(p, frozen, micro, x), dict(trainable), kept)
            return vjp(dy)

        grads, dx = self._over_batch(of_micro, kept, (dy, self.of_aux), self.batch)
        return self._scattered(grads, self._of_a_layer), dx

    def input_gradient(self, trainable: Leaves, frozen: Leaves, kept: Any, dy: jax.Array) -> jax.Array:
        def of_micro(kept: Any, dy: tuple[jax.Array, Leaves], micro: Batch) -> Any:
            if not self._recomputes:
                return (), self._pulled(trainable, frozen, kept, micro, dy)[-1]
            return (), jax.vjp(lambda x: self._block(trainable, frozen, micro, x), kept)[1](dy)[0]

        return self._over_batch(of_micro, kept, (dy, self.of_aux), self.batch)[1]

    @property
    def _recomputes(self) -> bool:
        return self.how.remat in ("none", "full")

    def _pulled(self, trainable: Leaves, frozen: Leaves, vjp: Any, micro: Batch, dy: Any) -> Any:
        """The gradients of the arguments of `_block`, by the `vjp` that `forward` kept."""
        vjp.args_res = [dict(trainable), dict(frozen), dict(micro), vjp.args_res[-1]]
        return vjp(dy)

    def _block(self, trainable: Leaves, frozen: Leaves, micro: Batch, x: jax.Array) -> tuple[jax.Array, Leaves]:
        layer = {**frozen, **trainable}
        ctx = self.lm.batch_context(micro).of_layer(layer[INDEX])
        # Their gradients then lie as they do: else those of which only squares are taken would be summed whole.
        laid_out = {name: jax.lax.with_sharding_constraint(layer[name], s) for name, s in self._of_a_layer.items()}
        out = self.lm.block(self.nested(laid_out)["layers"], x, ctx)
        return out.x, dict(out.aux)

    @cached_property
    def _of_a_layer(self) -> dict[str, NamedSharding]:
        """How the parameters of one layer are laid out."""
        layers, _ = layers_and_rest(self._shardings)
        return {name: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])) for name, s in layers.items()}

    @cached_property
    def _shardings(self) -> dict[str, NamedSharding]:
        return tree.flatten(self.lm.shardings())

    # What is not in the layers

    def embed(self) -> jax.Array:
        """What the first layer is given."""
        return self._over_batch(lambda micro: ((), self._embed({}, micro)), self.batch)[1]

    def _embed(self, leaves: Leaves, micro: Batch) -> jax.Array:
        return self.lm.embed(self.nested({**self.rest, **leaves}), micro["tokens"], self.lm.batch_context(micro))

    def head(self, output: jax.Array, aux: Leaves) -> tuple[Losses, Leaves, jax.Array, Leaves]:
        """The mean losses, the gradients of all that the head reads, that of the last layer's output, and `of_aux`.

        aux: the sums of the statistics over layers and micro-batches.
        """
        tied = self.lm.config.tie_word_embeddings
        chosen = {name: self.rest[name] for name in self.trainable if tied or not in_embedding(name)}

        def of_micro(x: jax.Array, micro: Batch) -> Any:
            def loss(leaves: Leaves, x: jax.Array, aux: Leaves) -> tuple[jax.Array, Losses]:
                sums = self.lm.head_losses(self.nested({**self.rest, **leaves}), x, micro, self.objective, aux)
                means = jax.tree.map(lambda total: total / self.trained, sums)
                return means.objective * self.factor, means

            (_, means), (grads, dx, of_aux) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(chosen, x, aux)
            return grads, (means, dx, of_aux)

        grads, (means, dx, of_aux) = self._over_batch(of_micro, output, self.batch)
        of_aux = jax.tree.map(lambda a: jnp.broadcast_to(jnp.sum(a, 0), a.shape), of_aux)  # each reads the same sums
        return jax.tree.map(jnp.sum, means), self.scattered_rest(grads), dx, of_aux

    def embed_gradients(self, dx: jax.Array, of_head: Leaves) -> Leaves:
        """The gradients of the embedding from that of its output, and from `of_head` where the head is tied to it."""
        chosen = {name: self.rest[name] for name in self.trainable if in_embedding(name)}

        def of_micro(dx: jax.Array, micro: Batch) -> Any:
            _, vjp = jax.vjp(lambda leaves: self._embed(leaves, micro), chosen)
            return vjp(dx)[0], ()

        grads, _ = self._over_batch(of_micro, dx, self.batch) if chosen else ({}, ())
        grads = self.scattered_rest(grads)
        return {name: g + of_head.get(name, 0) for name, g in grads.items()}

    def scattered_rest(self, grads: Leaves) -> Leaves:
        """Gradients of what is in no layer, of which each replica has its part where `how` says so."""
        return self._scattered(grads, self._shardings)

    # Over the batch

    def _over_batch(self, f: Any, *args: Any) -> tuple[Any, Any]:
        """`f(*args of a micro-batch) -> (gradients, each)`: gradients summed over the batch, the others as it lies."""
        total, each = self.replicas.each(lambda *args: sum_micro(f, *args), *args)
        return self.replicas.sum(total), each

    def _scattered(self, grads: Leaves, shardings: Mapping[str, NamedSharding]) -> Leaves:
        if not self.how.scattered:
            return grads
        return {
            name: jax.lax.with_sharding_constraint(g, over_replicas(shardings[name], g.shape))
            for name, g in grads.items()
        }
