"""The gradient of a batch whose micro-batches pass through the stages of a pipeline, one forward and one backward.

1F1B (Narayanan et al., "PipeDream", arXiv 1806.03377; without its stale weights: "Megatron-LM", arXiv 2104.04473,
section 2.2) as one program of all devices, see `models.gpipe`. In a tick each of p stages carries one micro-batch
forward and another one backward, so that what waits for its backward pass are 2p − 1 micro-batches, however many there
are. The backward pass is written by hand: it belongs to other micro-batches than the forward pass beside it.

Interleaved (section 2.2.2 there), a stage has v chunks of layers, and in a tick it carries a micro-batch through one of
them and another one back through one; 2vp − 1 of such passes wait. What the last stage gives then goes round to the
first one, and its gradient the other way, but at the ends of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.tree import Leaves, Params
from jaxllm.models.gpipe import STAGE_AXES, in_stages, of_pass, of_stage, on_stages, out_of_stages
from jaxllm.models.lm import LM
from jaxllm.models.pipeline_schedule import Schedule
from jaxllm.nn.context import Context
from jaxllm.objectives.base import Losses, Objective, TokenScores
from jaxllm.step.batch import BATCH_AXES, Batch, trained_tokens
from jaxllm.step.gradient import Gradient, loss_factor
from jaxllm.step.selection import OwnRows, SortedRows, rows_of_parts
from jaxllm.step.state import TrainState
from jaxllm.step.sweep import take

V = TypeVar("V")

Kept = Literal["layers", "stages", "all", "rows"]
"""What is kept of a micro-batch until its backward pass: the input of each layer, which is then computed once again;
or that of each stage, which is computed again before each of its layers is. All: the inputs of the layers, and the
gradients of what the stages give, of every micro-batch and beyond its passes. Rows: as layers, and of every micro-batch
the inputs of the layers that train and the gradients of their outputs, in place of the gradients of their weights."""


class Passed(NamedTuple):
    """What the passes of a batch leave behind.

    losses: the means. grads: of the trainable half, the layers in stages, or the rows of them, `[p, n, …]`, zero in
    stages that do not have them. inputs, dy: where all is kept, the inputs of the layers, `[p, L/p, m, B, T, D]`, and
    the gradients of what each of v chunks of a stage gives, `[p, v, m, B, T, D]`; where rows are, of each of them the
    input and the gradient of the output, `[p, n, m, B, T, D]`, in the stage that has it. of_aux: of each micro-batch,
    `[m, …]`, the derivative of the objective for the statistics of its layers.
    """

    losses: Losses
    grads: Params
    inputs: jax.Array
    dy: jax.Array
    of_aux: Leaves


def pipelined(kept: Kept = "layers") -> Gradient:
    """The gradient by a pipeline over the stages of the model's layout; micro-batches are those of the batch."""

    def gradient(
        lm: LM, state: TrainState, batch: Batch, objective: Objective, rows: jax.Array | None
    ) -> tuple[Losses, Params]:
        halves = state.params, state.frozen
        losses, grads, *_ = pass_through(lm, *halves, batch, objective, kept, loss_factor(state), rows)
        if rows is not None:
            return losses, {**grads, "layers": jax.tree.map(lambda g: jnp.sum(g, 0), grads["layers"])}
        grads["layers"] = out_of_stages(grads["layers"])
        shardings = tree.flatten(lm.shardings())
        grads = tree.map_with_path(lambda path, g: jax.lax.with_sharding_constraint(g, shardings[path]), grads)
        return losses, grads

    return gradient


def pass_through(
    lm: LM,
    trainable: Params,
    frozen: Params,
    batch: Batch,
    objective: Objective,
    kept: Kept = "layers",
    factor: Any = 1,
    rows: jax.Array | None = None,
    trained: jax.Array | None = None,
) -> Passed:
    """Every micro-batch forward and backward through the stages of the model's layout.

    trainable, frozen: the two halves of the parameters; no gradient is taken of what is frozen. factor: of the
    objective. rows: `[n]` int32, the places of the layers that train, any of which may fall to a stage; None = all.
    They may be traced, so that others need no other program, and a layer that is none of them has no gradient of
    weights. In a tick each stage waits for the one with most of them, and has room for the gradients of all. trained:
    the tokens to divide by; None = those of the batch.
    """

    def staged(params: Params, index: jax.Array | None) -> Params:
        return {**params, "layers": in_stages({"params": params["layers"], "index": index}, lm.layout)}

    halves = staged(trainable, None), staged(frozen, jnp.asarray(lm.layer_order))
    trained = trained_tokens(batch) if trained is None else trained
    passed = _Pipeline(lm, dict(batch), *halves, objective, trained, factor, kept, rows).passed()
    of_layers = passed.grads["layers"]
    if kept == "rows":
        return passed._replace(grads={**passed.grads, "layers": None}, inputs=of_layers["x"], dy=of_layers["dy"])
    return passed._replace(grads={**passed.grads, "layers": of_layers["params"]})


@dataclass(frozen=True)
class _Pipeline:
    """A batch on its way through the model.

    batch: arrays `[m, B, T]`. trainable, frozen: the two halves of the parameters, those of the layers in
    stages. trained: the batch's trained tokens. factor: of the objective. kept: see `Kept`. rows: see `pass_through`.
    """

    lm: LM
    batch: dict[str, jax.Array]
    trainable: Params
    frozen: Params
    objective: Objective
    trained: jax.Array
    factor: Any
    kept: Kept
    rows: jax.Array | None = None

    # What is done to one micro-batch

    def embed(self, leaves: Params, micro: Batch) -> jax.Array:
        """What the first stage is given, by a model with the trainable `leaves`."""
        params = tree.combine(leaves, {name: self.frozen[name] for name in leaves})
        return self.lm.embed(params, micro["tokens"], self.lm.batch_context(micro))

    def loss(self, leaves: Params, x: jax.Array, aux: Leaves, micro: Batch) -> tuple[jax.Array, Losses]:
        """The objective times `factor`, and the parts of the mean losses, of what the last stage gives."""
        params = tree.combine(leaves, {name: self.frozen[name] for name in leaves})
        sums = self.lm.head_losses(params, x, micro, self.objective, aux)
        means = jax.tree.map(lambda total: total / self.trained, sums)
        return means.objective * self.factor, means

    def forward_stage(
        self, chunk: Any, layers: Params, frozen: Params, x: jax.Array, micro: Batch
    ) -> tuple[jax.Array, Leaves, jax.Array]:
        """A chunk of one stage: `(its output, its statistics, what is kept)`."""
        y, aux, inputs = self.run_stage(chunk, layers, frozen, x, micro)
        return y, aux, x[None] if self.kept == "stages" else inputs

    def run_stage(
        self, chunk: Any, layers: Params, frozen: Params, x: jax.Array, micro: Batch
    ) -> tuple[jax.Array, Leaves, jax.Array]:
        """`(the output of a chunk of one stage, its statistics, the inputs of its layers [L/pv, B, T, D])`."""
        ctx = self.lm.batch_context(micro)

        # The layers are not scanned over: of all stages at a time that would be a transposition of their weights.
        def body(x: jax.Array, i: jax.Array) -> tuple[jax.Array, Any]:
            y, aux = self.block(take(layers, i), take(frozen, i), x, ctx)
            return y, (aux, x)

        y, (aux, inputs) = jax.lax.scan(body, x, chunk * self.depth + jnp.arange(self.depth))
        return y, jax.tree.map(lambda a: jnp.sum(a, 0), aux), inputs

    def backward_stage(
        self,
        chunk: Any,
        layers: Params,
        frozen: Params,
        totals: Params,
        kept: jax.Array,
        micro: Batch,
        counts: jax.Array,
        dy: jax.Array,
        of_aux: Leaves,
    ) -> tuple[Params, jax.Array]:
        """A chunk of one stage: its gradients added to `totals` if it `counts`, layer by layer; and that of its
        input."""
        ctx = self.lm.batch_context(micro)
        inputs = self.run_stage(chunk, layers, frozen, kept[0], micro)[2] if self.kept == "stages" else kept

        def body(k: jax.Array, carry: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
            totals, dx = carry
            of_chunk = self.depth - 1 - k
            i = chunk * self.depth + of_chunk
            of_frozen = take(frozen, i)
            _, vjp = jax.vjp(lambda layer, x: self.block(layer, of_frozen, x, ctx), take(layers, i), inputs[of_chunk])
            grads, dx = vjp((dx, of_aux))

            def add(total: jax.Array, grad: jax.Array) -> jax.Array:
                # What a stage computes in a bubble may be anything, even not finite.
                grad = jnp.where(counts, grad.astype(total.dtype), 0)
                return jax.lax.dynamic_update_index_in_dim(total, take(total, i) + grad, i, 0)

            return jax.tree.map(add, totals, grads), dx

        return jax.lax.fori_loop(0, self.depth, body, (totals, dy))

    def backward_rows(
        self,
        rows: SortedRows,
        most: jax.Array,
        chunk: Any,
        layers: Params,
        frozen: Params,
        totals: Params,
        kept: jax.Array,
        micro: Batch,
        counts: jax.Array,
        dy: jax.Array,
        of_aux: Leaves,
        own: OwnRows,
        number: jax.Array,
    ) -> tuple[Params, jax.Array]:
        """`backward_stage` with the gradients of those layers alone that train; with `kept` of rows, what these need.

        totals: `[n, …]`, one for each of the rows. most: the rows of the stage that has most. number: of the
        micro-batch.
        """
        ctx = self.lm.batch_context(micro)
        inputs = self.run_stage(chunk, layers, frozen, kept[0], micro)[2] if self.kept == "stages" else kept

        def down(dx: jax.Array, of_chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
            i = chunk * self.depth + of_chunk
            _, vjp = jax.vjp(lambda x: self.block(take(layers, i), take(frozen, i), x, ctx), inputs[of_chunk])
            return vjp((dx, of_aux))[0], dx

        dx, of_outputs = jax.lax.scan(down, dy, jnp.arange(self.depth), reverse=True)

        def of_row(k: jax.Array, totals: Params) -> Params:
            at = jnp.minimum(own.first + k, rows.places.shape[0] - 1)
            slot, is_own = rows.slots[at], counts & (k < own.count)
            of_chunk = jnp.clip(rows.places[at] - own.offset, 0, self.depth - 1)
            i, x, dy = chunk * self.depth + of_chunk, inputs[of_chunk], of_outputs[of_chunk]
            if self.kept == "rows":
                place = jnp.where(is_own, number, self.micro_batches)  # what is not there has no place
                return {name: totals[name].at[slot, place].set(a, mode="drop") for name, a in (("x", x), ("dy", dy))}
            _, vjp = jax.vjp(lambda layer: self.block(layer, take(frozen, i), x, ctx), take(layers, i))

            def add(total: jax.Array, grad: jax.Array) -> jax.Array:
                return total.at[slot].add(jnp.where(is_own, grad, 0).astype(total.dtype))

            return jax.tree.map(add, totals, vjp((dy, of_aux))[0])

        return jax.lax.fori_loop(0, most, of_row, totals), dx

    def block(self, layer: Params, frozen: Params, x: jax.Array, ctx: Context) -> tuple[jax.Array, Leaves]:
        whole = tree.combine(layer, frozen)
        out = self.lm.block(whole["params"], x, ctx.of_layer(whole["index"]))
        return out.x, dict(out.aux)

    # What happens in a tick

    def forward(self, t: jax.Array, x: jax.Array, aux: Leaves, ring: jax.Array) -> tuple[jax.Array, Leaves, jax.Array]:
        """Stage s makes its pass number t − s: `(the stages' outputs, their statistics and those of the stages before,
        the ring with what is kept)`."""
        layout, stages = self.lm.layout, jnp.arange(self.lm.layout.stages)
        chunks, micro = self.of_pass(t - stages)

        def embedded() -> jax.Array:
            read = take(self.batch, jnp.minimum(micro[0], self.micro_batches - 1))
            return jnp.where(of_stage(0, x), self.embed(self.read_by_embedding, read), x)

        x = layout.constrain(self.where(chunks[0] == 0, embedded, lambda: x), *STAGE_AXES)
        args = (self.trainable["layers"], self.frozen["layers"], x, self.micro_of_stages(micro))
        y, of_chunks, kept = self.on_chunks(self.forward_stage, chunks, *args)
        begins = chunks[0] == 0
        aux = {name: jnp.where(of_stage(0, a) & begins, 0, a) + of_chunks[name] for name, a in aux.items()}
        if self.kept == "all":
            ring = self.noted(ring, kept, chunks * self.depth, micro)
        else:
            ring = jax.lax.dynamic_update_index_in_dim(ring, kept, t % ring.shape[2], 2)
        return layout.constrain(y, *STAGE_AXES), aux, ring

    def backward(
        self, t: jax.Array, dy: jax.Array, of_aux: Leaves, ring: jax.Array, totals: Params, noted: jax.Array
    ) -> tuple[jax.Array, Params, jax.Array]:
        """Stage s makes its pass back number t − vp − p + 2 + s: `(the gradients of the inputs, totals, noted)`."""
        layout, stages = self.lm.layout, jnp.arange(self.lm.layout.stages)
        passes = t - self.ticks.warm_up - stages[-1] + stages
        chunks, micro = self.of_pass(passes)
        chunks = self.lm.virtual_stages - 1 - chunks
        works = (passes >= 0) & (passes < self.ticks.work)
        if self.kept == "all":
            noted = self.noted(noted, dy[:, None], chunks, micro)
            slots = jnp.clip(micro, 0, self.micro_batches - 1)
        else:
            slots = (self.number_of(chunks, micro) + stages) % ring.shape[2]  # by the tick of its forward pass
        kept = jax.vmap(lambda ring, slot: jax.lax.dynamic_index_in_dim(ring, slot, 1, keepdims=False))(ring, slots)
        if self.kept == "all" and self.lm.virtual_stages > 1:
            of_chunk = partial(jax.lax.dynamic_slice_in_dim, slice_size=self.depth)
            kept = jax.vmap(of_chunk)(kept, chunks * self.depth)
        args = (self.trainable["layers"], self.frozen["layers"], totals["layers"], kept)
        args = (*args, self.micro_of_stages(micro), works, dy, of_aux)
        if self.rows is None:
            of_layers, dx = self.on_chunks(self.backward_stage, chunks, *args)
        else:
            rows, of_chunks = rows_of_parts(self.rows, layout.stages * self.lm.virtual_stages, self.depth)
            own = jax.tree.map(lambda a: a[stages * self.lm.virtual_stages + chunks], of_chunks)
            run = partial(self.backward_rows, rows, jnp.max(own.count))
            place = jnp.clip(micro, 0, self.micro_batches - 1)
            of_layers, dx = self.on_chunks(run, chunks, *args, own, place)
        totals = {**totals, "layers": of_layers}
        dx = layout.constrain(dx, *STAGE_AXES)
        if jax.tree.leaves(self.read_by_embedding):

            def with_embedding() -> Params:
                read = take(self.batch, jnp.clip(micro[0], 0, self.micro_batches - 1))
                _, vjp = jax.vjp(lambda leaves: self.embed(leaves, read), self.read_by_embedding)
                return _added(totals, vjp(jnp.where(works[0], dx[0], 0))[0])

            totals = self.where(chunks[0] == 0, with_embedding, lambda: totals)
        return dx, totals, noted

    def noted(self, store: jax.Array, new: jax.Array, first: jax.Array, micro: jax.Array) -> jax.Array:
        """store `[p, N, m, …]` with what a stage has of its micro-batch, new `[p, n, …]`, from the place `first` `[p]`
        on; micro `[p]` int32."""
        # One that does not exist has no place, and what a bubble computes is dropped.
        places = jnp.where(micro < 0, self.micro_batches, micro)
        if self.lm.virtual_stages == 1:
            return jax.vmap(lambda store, new, place: store.at[:, place].set(new, mode="drop"))(store, new, places)

        def note(store: jax.Array, new: jax.Array, first: jax.Array, place: jax.Array) -> jax.Array:
            return store.at[first + jnp.arange(new.shape[0]), place].set(new, mode="drop")

        return jax.vmap(note)(store, new, first, places)

    def passed(self) -> Passed:
        """The mean losses, the gradients in the form of `trainable`, and what is kept."""
        layout, ticks = self.lm.layout, self.ticks
        last = layout.stages - 1
        first = self.embed(self.read_by_embedding, take(self.batch, jnp.int32(0)))
        x = layout.constrain(jnp.broadcast_to(first, (layout.stages, *first.shape)), *STAGE_AXES)

        def room(depth: int, slots: int) -> jax.Array:
            zeros = jnp.zeros((layout.stages, depth, slots, *first.shape), first.dtype)
            return layout.constrain(zeros, STAGE_AXES[0], None, None, *STAGE_AXES[1:])

        depth = 1 if self.kept == "stages" else self.depth
        if self.kept == "all":
            virtual = self.lm.virtual_stages
            ring, noted = room(virtual * depth, self.micro_batches), room(virtual, self.micro_batches)
        else:
            ring, noted = room(depth, 2 * ticks.warm_up + 1), room(1, 0)
        totals = self.zeros()
        if self.kept == "rows":
            assert self.rows is not None
            totals["layers"] = {name: room(len(self.rows), self.micro_batches) for name in ("x", "dy")}

        def shifted(by: int, of_stages: Any) -> Any:
            return jax.tree.map(lambda a: jnp.roll(a, by, 0), of_stages)

        def warm_up(t: jax.Array, carry: Any) -> Any:
            y, aux, ring = self.forward(t, *carry)
            return *shifted(1, (y, aux)), ring

        def steady(t: jax.Array, carry: Any) -> Any:
            x, aux, (dy, of_aux, ring, totals, noted), (losses, of_batch) = carry
            y, aux, ring = self.forward(t, x, aux, ring)
            chunk, micro = self.of_pass(t - last)

            def with_loss() -> tuple[jax.Array, Leaves, Params, tuple[Losses, Leaves]]:
                of_last = {name: a[-1] for name, a in aux.items()}
                loss = jax.value_and_grad(self.loss, argnums=(0, 1, 2), has_aux=True)
                (_, means), (of_head, *new) = loss(self.read_by_head, y[-1], of_last, take(self.batch, micro))

                def at_last(new: jax.Array, of_stages: jax.Array) -> jax.Array:
                    return jnp.where(of_stage(last, of_stages), new, of_stages)

                new_dy, new_of_aux = jax.tree.map(at_last, tuple(new), (dy, of_aux))
                noted_aux = {name: a.at[micro].set(new[1][name]) for name, a in of_batch.items()}
                new_dy = layout.constrain(new_dy, *STAGE_AXES)
                return new_dy, new_of_aux, _added(totals, of_head), (jax.tree.map(jnp.add, losses, means), noted_aux)

            is_last = chunk == self.lm.virtual_stages - 1
            before = dy, of_aux, totals, (losses, of_batch)
            dy, of_aux, totals, of_losses = self.where(is_last, with_loss, lambda: before)
            dx, totals, noted = self.backward(t, dy, of_aux, ring, totals, noted)
            back = *shifted(-1, (dx, of_aux)), ring, totals, noted
            return *shifted(1, (y, aux)), back, of_losses

        def cool_down(t: jax.Array, carry: Any) -> Any:
            dy, of_aux, ring, totals, noted = carry
            dx, totals, noted = self.backward(t, dy, of_aux, ring, totals, noted)
            return *shifted(-1, (dx, of_aux)), ring, totals, noted

        def no_aux(count: int) -> Leaves:
            return {name: jnp.zeros((count, *a.shape), a.dtype) for name, a in self.lm.aux.items()}

        x, aux, ring = jax.lax.fori_loop(0, ticks.warm_up, warm_up, (x, no_aux(layout.stages), ring))
        back = jnp.zeros_like(x), no_aux(layout.stages), ring, totals, noted
        of_losses = self.no_losses(at_least_float32(first.dtype)), no_aux(self.micro_batches)
        start, end = ticks.warm_up, ticks.warm_up + ticks.steady
        *_, back, (losses, of_batch) = jax.lax.fori_loop(start, end, steady, (x, aux, back, of_losses))
        *_, ring, totals, noted = jax.lax.fori_loop(end, end + ticks.cool_down, cool_down, back)
        return Passed(losses, totals, ring, noted, of_batch)

    def no_losses(self, dtype: DTypeLike) -> Losses:
        """What the losses are added to."""
        micro = take(self.batch, jnp.zeros((), jnp.int32))
        scores = TokenScores(*(jnp.zeros(micro["tokens"].shape, dtype) for _ in TokenScores._fields))
        aux = {name: jnp.zeros(a.shape, a.dtype) for name, a in self.lm.aux.items()}
        return jax.tree.map(jnp.zeros_like, jax.eval_shape(lambda: self.objective(scores, micro, aux or None)))

    def zeros(self) -> Params:
        """What the gradients are added to."""

        def rows_of(a: jax.Array) -> jax.Array:
            return a if self.rows is None else jnp.broadcast_to(a[:, :1], (len(a), len(self.rows), *a.shape[2:]))

        like = {**self.trainable, "layers": jax.tree.map(rows_of, self.trainable["layers"])}
        return jax.tree.map(lambda a: jnp.zeros_like(a, at_least_float32(a.dtype)), like)

    # Which parts of the model and the batch are read

    @property
    def micro_batches(self) -> int:
        return self.batch["tokens"].shape[0]

    @property
    def ticks(self) -> Schedule:
        return Schedule(self.lm.layout.stages, self.micro_batches, virtual=self.lm.virtual_stages)

    @property
    def depth(self) -> int:
        """The layers of a chunk."""
        return self.frozen["layers"]["index"].shape[-1] // self.lm.virtual_stages

    def of_pass(self, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`(chunk, micro-batch)` of a stage's pass number u."""
        return of_pass(u, self.lm.layout.stages, self.lm.virtual_stages)

    def number_of(self, chunk: jax.Array, micro: jax.Array) -> jax.Array:
        """The inverse of `of_pass`."""
        stages = self.lm.layout.stages
        return (micro // stages * self.lm.virtual_stages + chunk) * stages + micro % stages

    def on_chunks(self, f: Any, chunks: jax.Array, *args: Any) -> Any:
        """`f(chunk, …)` of all stages. Where there is one chunk, its layers are at the same places in each."""
        if self.lm.virtual_stages == 1:
            return on_stages(partial(f, 0), self.lm.layout)(*args)
        return on_stages(f, self.lm.layout)(chunks, *args)

    def where(self, is_end: jax.Array, then: Callable[[], V], otherwise: Callable[[], V]) -> V:
        """`then()` at an end of the model, which all passes are at where a stage has one chunk."""
        return then() if self.lm.virtual_stages == 1 else jax.lax.cond(is_end, then, otherwise)

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
