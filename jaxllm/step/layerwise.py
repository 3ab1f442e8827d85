"""A model taken apart at its layers, for walks that see one layer at a time, over all micro-batches of a batch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.core import tree
from jaxllm.models.lm import LM
from jaxllm.objectives.base import Losses, Objective
from jaxllm.step.batch import Batch, trained_tokens
from jaxllm.step.leaf_update import Leaves
from jaxllm.step.sweep import sum_micro

INDEX = "index"
"""Beside the parameters of the layers: which of them each is."""


def in_embedding(name: str) -> bool:
    return name.startswith("embed/")


def layers_and_rest(leaves: Leaves) -> tuple[Leaves, Leaves]:
    layers = {name: leaf for name, leaf in leaves.items() if name.startswith("layers/")}
    return layers, {name: leaf for name, leaf in leaves.items() if name not in layers}


@dataclass(frozen=True)
class Layerwise:
    """A model around its layers, over all micro-batches of a batch.

    nested: makes a tree of leaves. rest: all parameters but the layers'; trainable: which of them train.
    """

    lm: LM
    nested: Any
    rest: Leaves
    trainable: Iterable[str]
    batch: dict[str, jax.Array]
    objective: Objective

    def block(self, layer: Mapping[str, jax.Array], x: jax.Array, micro: Batch) -> jax.Array:
        ctx = self.lm.batch_context(micro).of_layer(layer[INDEX])
        # Their gradients then lie as they do: else those of which only squares are taken would be summed whole.
        laid_out = {name: jax.lax.with_sharding_constraint(layer[name], s) for name, s in self._of_a_layer.items()}
        return self.lm.block(self.nested(laid_out)["layers"], x, ctx)[0]

    @cached_property
    def _of_a_layer(self) -> dict[str, NamedSharding]:
        """How the parameters of one layer are laid out."""
        layers, _ = layers_and_rest(tree.flatten(self.lm.shardings()))
        return {name: NamedSharding(s.mesh, PartitionSpec(*s.spec[1:])) for name, s in layers.items()}

    def embed(self) -> jax.Array:
        """What the first layer is given, `[M, B, T, D]`."""
        return sum_micro(lambda micro: ((), self._embed({}, micro)), self.batch)[1]

    def _embed(self, leaves: Leaves, micro: Batch) -> jax.Array:
        return self.lm.embed(self.nested({**self.rest, **leaves}), micro["tokens"], self.lm.batch_context(micro))

    def head(self, output: jax.Array) -> tuple[tuple[Losses, Leaves], jax.Array]:
        """The mean losses, the gradients of all that the head reads, and that of the last layer's output."""
        tied = self.lm.config.tie_word_embeddings
        chosen = {name: self.rest[name] for name in self.trainable if tied or not in_embedding(name)}
        trained = trained_tokens(self.batch)

        def of_micro(x: jax.Array, micro: Batch) -> Any:
            def loss(leaves: Leaves, x: jax.Array) -> tuple[jax.Array, Losses]:
                sums = self.lm.head_losses(self.nested({**self.rest, **leaves}), x, micro, self.objective)
                means = jax.tree.map(lambda total: total / trained, sums)
                return means.objective, means

            (_, means), (grads, dx) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(chosen, x)
            return (means, grads), dx

        return sum_micro(of_micro, output, self.batch)

    def embed_gradients(self, dx: jax.Array, of_head: Leaves) -> Leaves:
        """The gradients of the embedding from that of its output, and from `of_head` where the head is tied to it."""
        chosen = {name: self.rest[name] for name in self.trainable if in_embedding(name)}

        def of_micro(dx: jax.Array, micro: Batch) -> Any:
            _, vjp = jax.vjp(lambda leaves: self._embed(leaves, micro), chosen)
            return vjp(dx)[0], ()

        grads, _ = sum_micro(of_micro, dx, self.batch) if chosen else ({}, ())
        return {name: g + of_head.get(name, 0) for name, g in grads.items()}
