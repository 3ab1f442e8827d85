"""The gradient of a batch whose micro-batches pass through the stages of a pipeline, one forward and one backward.

1F1B (Narayanan et al., "PipeDream", arXiv 1806.03377; without its stale weights: "Megatron-LM", arXiv 2104.04473,
section 2.2) as one program of all devices, see `models.pipeline`. In a tick each of p stages carries one micro-batch
forward and another one backward, so that what waits for its backward pass are 2p − 1 micro-batches, however many there
are. The backward pass is written by hand: it belongs to other micro-batches than the forward pass beside it.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Params
from jaxllm.models.base import LM
from jaxllm.models.pipeline import STAGE_AXES, in_stages, of_stage, on_stages
from jaxllm.nn.context import Context
from jaxllm.nn.loss import Losses, Objective
from jaxllm.train.state import TrainState
from jaxllm.train.step import BATCH_AXES, Batch, Gradient, trained_tokens
from jaxllm.train.sweep import take

Kept = Literal["layers", "stages"]
"""What is kept of a micro-batch until its backward pass: the input of each layer, which is then computed once again;
or that of each stage, which is computed again before each of its layers is."""


@dataclass(frozen=True)
class Schedule:
    """When p stages work on m micro-batches: warm_up ticks forward, steady ones forward and backward, and cool_down
    ones backward."""

    stages: int
    micro_batches: int

    @property
    def warm_up(self) -> int:
        return self.stages - 1

    @property
    def steady(self) -> int:
        return self.micro_batches

    @property
    def cool_down(self) -> int:
        return self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of the time in which a stage waits: the passes of p − 1 micro-batches beside those of m."""
        return self.warm_up / (self.warm_up + self.steady)

    @property
    def metrics(self) -> dict[str, float]:
        """What a run's first line of metrics has of it."""
        return {"perf/bubble": self.bubble} if self.stages > 1 else {}

    def __str__(self) -> str:
        return (
            f"{self.stages} stages and {self.micro_batches} micro-batches: {self.warm_up} ticks forward, {self.steady} "
            f"forward and backward, {self.cool_down} backward; each stage waits {self.bubble:.1%} of the time"
        )


def pipelined(kept: Kept = "layers") -> Gradient:
    """The gradient by a pipeline over the stages of the model's layout; micro-batches are those of the batch."""

    def gradient(lm: LM, state: TrainState, batch: Batch, objective: Objective) -> tuple[Losses, Params]:
        trained, layers = trained_tokens(batch), lm.config.num_hidden_layers

        def staged(params: Params, index: jax.Array | None) -> Params:
            return {**params, "layers": in_stages({"params": params["layers"], "index": index}, lm.layout)}

        halves = staged(state.params, None), staged(state.frozen, jnp.arange(layers))
        factor = 1 if state.loss_scale is None else state.loss_scale.scale
        losses, grads = _Pipeline(lm, dict(batch), *halves, objective, trained, factor, kept).gradient()
        grads["layers"] = jax.tree.map(lambda g: g.reshape(layers, *g.shape[2:]), grads["layers"]["params"])
        shardings = tree.flatten(lm.shardings())
        grads = tree.map_with_path(lambda path, g: jax.lax.with_sharding_constraint(g, shardings[path]), grads)
        return losses, grads

    return gradient


@dataclass(frozen=True)
class _Pipeline:
    """A batch on its way through the model.

    batch: arrays `[m, B, T]`. trainable, frozen: the two halves of the parameters, those of the layers in
    stages. trained: the batch's trained tokens. factor: of the objective. kept: see `Kept`.
    """

    lm: LM
    batch: dict[str, jax.Array]
    trainable: Params
    frozen: Params
    objective: Objective
    trained: jax.Array
    factor: Any
    kept: Kept

    # What is done to one micro-batch

    def embed(self, leaves: Params, micro: Batch) -> jax.Array:
        """What the first stage is given, by a model with the trainable `leaves`."""
        params = tree.combine(leaves, {name: self.frozen[name] for name in leaves})
        return self.lm.embed(params, micro["tokens"], self.lm.batch_context(micro))

    def loss(self, leaves: Params, x: jax.Array, micro: Batch) -> tuple[jax.Array, Losses]:
        """The objective times `factor`, and the parts of the mean losses, of what the last stage gives."""
        params = tree.combine(leaves, {name: self.frozen[name] for name in leaves})
        sums = self.lm.head_losses(params, x, micro, self.objective)
        means = jax.tree.map(lambda total: total / self.trained, sums)
        return means.objective * self.factor, means

    def forward_stage(self, layers: Params, frozen: Params, x: jax.Array, micro: Batch) -> tuple[jax.Array, jax.Array]:
        """One stage: `(its output, what is kept)`."""
        ctx = self.lm.batch_context(micro)

        def body(x: jax.Array, layer: tuple[Params, Params]) -> tuple[jax.Array, jax.Array]:
            return self.block(*layer, x, ctx), x

        y, inputs = jax.lax.scan(body, x, (layers, frozen))
        return y, inputs if self.kept == "layers" else x

    def backward_stage(
        self,
        layers: Params,
        frozen: Params,
        totals: Params,
        kept: jax.Array,
        micro: Batch,
        counts: jax.Array,
        dy: jax.Array,
    ) -> tuple[Params, jax.Array]:
        """One stage: its gradients added to `totals` if it `counts`, layer by layer; and that of its input."""
        ctx = self.lm.batch_context(micro)
        inputs = kept
        if self.kept == "stages":
            _, inputs = jax.lax.scan(lambda x, layer: (self.block(*layer, x, ctx), x), kept, (layers, frozen))

        def body(k: jax.Array, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            totals, dx = carry
            i = inputs.shape[0] - 1 - k
            of_frozen = take(frozen, i)
            _, vjp = jax.vjp(lambda layer, x: self.block(layer, of_frozen, x, ctx), take(layers, i), inputs[i])
            grads, dx = vjp(dx)

            def add(total: jax.Array, grad: jax.Array) -> jax.Array:
                # What a stage computes in a bubble may be anything, even not finite.
                grad = jnp.where(counts, grad.astype(total.dtype), 0)
                return jax.lax.dynamic_update_index_in_dim(total, take(total, i) + grad, i, 0)

            return jax.tree.map(add, totals, grads), dx

        return jax.lax.fori_loop(0, inputs.shape[0], body, (totals, dy))

    def block(self, layer: Params, frozen: Params, x: jax.Array, ctx: Context) -> jax.Array:
        whole = tree.combine(layer, frozen)
        return self.lm.block(whole["params"], x, ctx.of_layer(whole["index"]))[0]

    # What happens in a tick

    def forward(self, t: jax.Array, x: jax.Array, ring: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Stage s carries micro-batch t − s forward: `(the stages' outputs, the ring with what is kept)`."""
        layout, stages = self.lm.layout, jnp.arange(self.lm.layout.stages)
        first = self.embed(self.read_by_embedding, take(self.batch, jnp.minimum(t, self.micro_batches - 1)))
        x = layout.constrain(jnp.where(of_stage(0, x), first, x), *STAGE_AXES)
        run = on_stages(self.forward_stage, layout)
        y, kept = run(self.trainable["layers"], self.frozen["layers"], x, self.micro_of_stages(t - stages))
        return layout.constrain(y, *STAGE_AXES), jax.lax.dynamic_update_index_in_dim(ring, kept, t % ring.shape[1], 1)

    def backward(self, t: jax.Array, dy: jax.Array, ring: jax.Array, totals: Params) -> tuple[jax.Array, Params]:
        """Stage s carries micro-batch t − 2(p − 1) + s backward: `(the gradients of the inputs, totals)`."""
        layout, stages = self.lm.layout, jnp.arange(self.lm.layout.stages)
        micro = t - 2 * stages[-1] + stages
        slots = (micro + stages) % ring.shape[1]  # by the tick of its forward pass
        kept = jax.vmap(lambda ring, slot: jax.lax.dynamic_index_in_dim(ring, slot, keepdims=False))(ring, slots)
        counts = (micro >= 0) & (micro < self.micro_batches)
        run = on_stages(self.backward_stage, layout)
        halves = self.trainable["layers"], self.frozen["layers"]
        of_layers, dx = run(*halves, totals["layers"], kept, self.micro_of_stages(micro), counts, dy)
        totals = {**totals, "layers": of_layers}
        dx = layout.constrain(dx, *STAGE_AXES)
        if jax.tree.leaves(self.read_by_embedding):
            read = take(self.batch, jnp.clip(micro[0], 0, self.micro_batches - 1))
            _, vjp = jax.vjp(lambda leaves: self.embed(leaves, read), self.read_by_embedding)
            totals = _added(totals, vjp(jnp.where(counts[0], dx[0], 0))[0])
        return dx, totals

    def gradient(self) -> tuple[Losses, Params]:
        """The mean losses, and the gradients in the form of `trainable`."""
        layout = self.lm.layout
        last = layout.stages - 1
        first = self.embed(self.read_by_embedding, take(self.batch, jnp.int32(0)))
        x = layout.constrain(jnp.broadcast_to(first, (layout.stages, *first.shape)), *STAGE_AXES)
        depth = self.frozen["layers"]["index"].shape[1:] if self.kept == "layers" else ()
        ring = jnp.zeros((layout.stages, 2 * last + 1, *depth, *first.shape), first.dtype)
        ring = layout.constrain(ring, STAGE_AXES[0], *[None] * (1 + len(depth)), *STAGE_AXES[1:])
        totals = jax.tree.map(lambda a: jnp.zeros_like(a, at_least_float32(a.dtype)), self.trainable)

        def warm_up(t: jax.Array, carry: Any) -> Any:
            y, ring = self.forward(t, *carry)
            return jnp.roll(y, 1, 0), ring

        def steady(t: jax.Array, carry: Any) -> Any:
            x, dy, ring, totals, losses = carry
            y, ring = self.forward(t, x, ring)
            micro = take(self.batch, t - last)
            loss = jax.value_and_grad(self.loss, argnums=(0, 1), has_aux=True)
            (_, means), (of_head, dlast) = loss(self.read_by_head, y[-1], micro)
            dy = layout.constrain(jnp.where(of_stage(last, dy), dlast, dy), *STAGE_AXES)
            dx, totals = self.backward(t, dy, ring, _added(totals, of_head))
            return jnp.roll(y, 1, 0), jnp.roll(dx, -1, 0), ring, totals, jax.tree.map(jnp.add, losses, means)

        def cool_down(t: jax.Array, carry: Any) -> Any:
            dy, ring, totals = carry
            dx, totals = self.backward(t, dy, ring, totals)
            return jnp.roll(dx, -1, 0), ring, totals

        ticks = Schedule(layout.stages, self.micro_batches)
        x, ring = jax.lax.fori_loop(0, ticks.warm_up, warm_up, (x, ring))
        zero = jnp.zeros((), at_least_float32(first.dtype))
        carry = (x, jnp.zeros_like(x), ring, totals, Losses(zero, zero, zero))
        start, end = ticks.warm_up, ticks.warm_up + ticks.steady
        _, dy, ring, totals, losses = jax.lax.fori_loop(start, end, steady, carry)
        _, _, totals = jax.lax.fori_loop(end, end + ticks.cool_down, cool_down, (dy, ring, totals))
        return losses, totals

    # Which parts of the model and the batch are read

    @property
    def micro_batches(self) -> int:
        return self.batch["tokens"].shape[0]

    @property
    def read_by_embedding(self) -> Params:
        return {"embed": self.trainable["embed"]}

    @property
    def read_by_head(self) -> Params:
        tied = self.lm.config.tie_word_embeddings
        return {name: part for name, part in self.trainable.items() if name != "layers" and (tied or name != "embed")}

    def micro_of_stages(self, micro: jax.Array) -> Batch:
        """What a stage needs of its micro-batch, micro `[p]` int32: looked up, and not passed on."""
        chosen = jnp.clip(micro, 0, self.micro_batches - 1)
        read = {name: self.batch[name] for name in _READ_BY_LAYERS if name in self.batch}
        axes = (STAGE_AXES[0], *BATCH_AXES[1:])
        return {name: self.lm.layout.constrain(a[chosen], *axes[: a.ndim]) for name, a in read.items()}


_READ_BY_LAYERS = ("positions", "segments", "dropout_keys")


def _added(totals: Params, grads: Params) -> Params:
    """`totals` with those of its parts increased that `grads` has."""
    new = {name: jax.tree.map(lambda t, g: t + g.astype(t.dtype), totals[name], part) for name, part in grads.items()}
    return {**totals, **new}
