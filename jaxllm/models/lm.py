"""A language model as a pure function of its parameters: `embed`, a stack of equal `block`s, `head`."""

import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxllm.core import tree
from jaxllm.core.fit import check_fits
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Leaves, Params
from jaxllm.kernels.attention import AttentionForm
from jaxllm.kernels.attention_choice import AttentionNeeds
from jaxllm.models.family import Family, FamilyConfig
from jaxllm.models.gpipe import order_of_layers, pipeline
from jaxllm.models.quantized import Quantization
from jaxllm.models.stack import Output, Stack, scan
from jaxllm.models.token_arrays import check_token_arrays
from jaxllm.nn.attention import VIRTUAL
from jaxllm.nn.cache import LayerCache
from jaxllm.nn.context import CachePosition, Context
from jaxllm.nn.dropout import Dropout
from jaxllm.nn.embed import BESIDE
from jaxllm.nn.loss import loss_chunks, token_scores
from jaxllm.nn.prefix import FOLDER, projected_prefix
from jaxllm.nn.rope import rope_tables
from jaxllm.objectives.base import CROSS_ENTROPY, Losses, Objective, TokenScores, reads_mean_logit


@dataclass(frozen=True)
class ExtraLeaf:
    """A parameter that an adapter adds to a model.

    axes: the logical names of its axes. draw: its value at the start, of a key and of the model's own parameters.
    frozen: whether it never trains. vocab_axis: the dimension that is as long as the vocabulary in memory.
    """

    axes: tuple[str | None, ...]
    draw: Callable[[jax.Array, Params], jax.Array]
    frozen: bool = False
    vocab_axis: int | None = None


@dataclass(frozen=True)
class LM:
    """A language model: its config, layout and dtypes. It holds no arrays.

    param_dtype: the dtype of the parameters, or one for each path.
    compute_dtype: the dtype of activations and matrix products.
    attention: the form of attention outside decoding. "cudnn" is for batches with one document a row.
    dropout: the share that is dropped of the embedding and of each sublayer's output, in batches with `dropout_keys`.
    adapter_dropout: the share that is dropped of what the low-rank part of an adapter is given, in such batches.
    prompt_tokens, prefix_tokens: virtual tokens in front of every document, which an adapter has embeddings of, or keys
        and values in each layer. Positions count them.
    extra: by their paths, the parameters that an adapter adds (`jaxllm.peft`).
    virtual_stages: in a pipeline, the chunks of layers that each stage has. The leaves of the layers then have the
        order of `order_of_layers`, as what trains has them; those that are loaded, drawn and exported do not.
    quantization: how the matrices of the layers are stored where that is not in `param_dtype`; those are loaded
        (`jaxllm.hf`), and not drawn.
    source: where a converted model came from, for the way back (`jaxllm.hf`); None for a new one.
    """

    family: Family
    config: FamilyConfig
    layout: Layout
    param_dtype: DTypeLike | Mapping[str, DTypeLike] = jnp.float32
    compute_dtype: DTypeLike = jnp.float32
    attention: AttentionForm = "xla"
    dropout: float = 0.0
    adapter_dropout: float = 0.0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    extra: Mapping[str, ExtraLeaf] = field(default_factory=dict)
    virtual_stages: int = 1
    quantization: Quantization | None = None
    source: Any = None

    # Parameters

    def init(self, key: jax.Array) -> Params:
        """New parameters drawn from `key`, with the same bits on any mesh, laid out by `self.layout`."""
        return jax.jit(self._init, out_shardings=self.shardings())(key)

    def abstract(self) -> Params:
        """The shape, dtype and sharding of every parameter, without arrays."""
        shapes, axes = self._shapes_and_axes
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self.layout.shardings(axes, shapes),
        )

    def axes(self) -> Params:
        """The logical axis names of every parameter."""
        return self._shapes_and_axes[1]

    @property
    def plain(self) -> "LM":
        """The model with all its matrices as they are computed with, and its layers one behind the other."""
        return replace(self, quantization=None, virtual_stages=1)

    @property
    def layer_order(self) -> np.ndarray:
        """`[L]`: which layer is at each place of the leaves of the layers."""
        return order_of_layers(self.config.num_hidden_layers, self.layout.stages, self.virtual_stages)

    @cached_property
    def _shapes_and_axes(self) -> tuple[Params, Params]:
        boxed = self._boxed_shapes(self.family, cast(Hashable, self.config), jnp.dtype(self.compute_dtype))
        names = jax.tree.map(lambda box: box.names, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))
        # Under `vmap` a box does not learn of the new leading axis.
        names["layers"] = jax.tree.map(
            lambda leaf: ("layers", *leaf), names["layers"], is_leaf=lambda leaf: isinstance(leaf, tuple)
        )
        names = tree.insert(names, {path: leaf.axes for path, leaf in self.extra.items()})
        shapes = jax.eval_shape(self._completed, nn.unbox(boxed), jax.random.key(0))
        return (shapes, names) if self.quantization is None else self.quantization.replaced(shapes, names, self.layout)

    def shardings(self) -> Params:
        """The sharding of every parameter."""
        shapes, axes = self._shapes_and_axes
        return self.layout.shardings(axes, shapes)

    @property
    def vocab_padded(self) -> int:
        """The vocabulary in memory: a multiple of the ways that the layout splits it."""
        ways = math.lcm(self.layout.size("vocab"), self.layout.size("act_vocab"))
        return math.ceil(self.config.vocab_size / ways) * ways

    @property
    def paddable(self) -> dict[str, tuple[int, int]]:
        """By path, the dimension of a parameter that some layouts pad, and the real size of that."""
        rules = self.family.rules(self.config)
        axes = {rule.path: rule.vocab_axis for rule in rules if rule.vocab_axis is not None}
        axes |= {path: leaf.vocab_axis for path, leaf in self.extra.items() if leaf.vocab_axis is not None}
        return {path: (axis, self.config.vocab_size) for path, axis in axes.items()}

    @property
    def padded(self) -> dict[str, tuple[int, int]]:
        """`paddable`; empty where this layout pads nothing."""
        return {} if self.vocab_padded == self.config.vocab_size else self.paddable

    def check_params(self, params: Params, also: Sequence[str] = ()) -> None:
        """Raises UserError unless `params` has the leaves of the model, and others whose paths end in one of `also`."""
        leaves, known = tree.flatten(params), self._leaves
        check_fits(
            {path: leaf for path, leaf in leaves.items() if path in known or path.rpartition("/")[2] not in also},
            known,
            what="the parameters do not fit the model",
            remedy="Give them as init or load_hf makes them for this model, or build the model with their sizes",
        )

    @cached_property
    def _leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        return tree.flatten(self._shapes_and_axes[0])

    @staticmethod
    @lru_cache(maxsize=32)
    def _boxed_shapes(family: Family, config: FamilyConfig, compute_dtype: np.dtype[Any]) -> Params:
        """Shapes and axis names of the plain model. Tracing a block takes a third of a second, so they are kept."""
        plain = LM(family, config, Layout.single(), compute_dtype=compute_dtype)
        return jax.eval_shape(plain._init_boxed, jax.random.key(0))

    def _init_boxed(self, key: jax.Array) -> Params:
        c = self.config
        embed_key, layers_key, norm_key, head_key = jax.random.split(key, 4)
        x = jnp.zeros((1, 1, c.hidden_size), self.compute_dtype)
        ctx = replace(self.context(jnp.zeros((1, 1), jnp.int32), begins=False), layout=Layout.single(), attention="xla")
        params = {
            "embed": self.family.embed(c, self.compute_dtype).init(embed_key, jnp.zeros((1, 1), jnp.int32), ctx),
            "layers": jax.vmap(lambda key: self._block.init(key, x, ctx))(
                jax.random.split(layers_key, c.num_hidden_layers)
            ),
            "norm": self._norm.init(norm_key, x),
        }
        if not c.tie_word_embeddings:
            params["head"] = self.family.head(c, self.compute_dtype).init(head_key, x, {})
        return {name: collection["params"] for name, collection in params.items()}

    def _init(self, key: jax.Array) -> Params:
        return self._completed(nn.unbox(self._init_boxed(key)), key)

    def _completed(self, params: Params, key: jax.Array) -> Params:
        """Drawn parameters with the padding, dtypes and extra leaves of this model."""
        # Padding is added to what was drawn for the real vocabulary, so that it cannot change the draw.
        pad = self.vocab_padded - self.config.vocab_size
        padded = {"embed/table": jnp.pad(params["embed"]["table"], ((0, pad), (0, 0)))}
        if "head" in params:
            padded["head/kernel"] = jnp.pad(params["head"]["kernel"], ((0, 0), (0, pad)))
        params = tree.insert(params, padded)
        params = tree.map_with_path(lambda path, leaf: leaf.astype(self._dtype_of(path)), params)
        return self.with_extra(params, key)

    def with_extra(self, params: Params, key: jax.Array) -> Params:
        """`params` with those of the extra leaves that are not there, each drawn from `key` and its path alone."""
        lacking = {path: leaf for path, leaf in self.extra.items() if path not in tree.flatten(params)}
        keys = {path: jax.random.fold_in(key, zlib.crc32(path.encode())) for path in lacking}
        return tree.insert(params, {path: leaf.draw(keys[path], params) for path, leaf in lacking.items()})

    def _dtype_of(self, path: str) -> DTypeLike:
        return self.param_dtype[path] if isinstance(self.param_dtype, Mapping) else self.param_dtype

    # Computation

    @property
    def _block(self) -> nn.Module:
        return self.family.block(self.config, self.compute_dtype)

    @property
    def _norm(self) -> nn.Module:
        return self.family.norm(self.config, self.compute_dtype)

    @property
    def _in_memory(self) -> FamilyConfig:
        """The config with the vocabulary as it is padded."""
        return self.config.model_copy(update={"vocab_size": self.vocab_padded})

    def attention_needs(self, packed: bool) -> AttentionNeeds:
        """What the form of attention is chosen for. packed: whether a row may hold several documents."""
        c = self.config
        heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim)
        virtual = "prefix" if self.prefix_tokens else "prompt" if self.prompt_tokens else "none"
        of_layers, spec = self.family.layer_data(c).window, c.attention
        spec = spec if of_layers is None else spec._replace(window=of_layers[0])
        return AttentionNeeds(self.layout, *heads, self.compute_dtype, packed, virtual, spec)

    def context(
        self,
        positions: jax.Array,
        segments: jax.Array | None = None,
        cache: CachePosition | None = None,
        begins: bool = True,
    ) -> Context:
        """The context of a batch with `positions` `[B, T]` int32 and `segments` `[B, T]` int32.

        begins: whether its rows begin here, with the virtual tokens of a prompt where there are any; else those are in
        the `cache`.
        """
        c, front = self.config, self.prompt_tokens if begins else 0
        positions = positions + (self.prompt_tokens + self.prefix_tokens)
        if front:
            virtual = jnp.broadcast_to(jnp.arange(front, dtype=positions.dtype), (len(positions), front))
            positions = jnp.concatenate([virtual, positions], axis=1)
            if segments is not None:
                segments = jnp.pad(segments, ((0, 0), (front, 0)), constant_values=VIRTUAL)
        tables = rope_tables(positions, c.rotation, self.compute_dtype, c.rope, segments)
        ctx = Context(self.layout, tables, segments, self.attention, cache, shared=self.prompt_tokens, begins=begins)
        return replace(ctx, layers=self.family.layer_data(c))

    def batch_context(self, batch: Mapping[str, jax.Array]) -> Context:
        """The context of a batch to train on: `positions`, `segments`, and `dropout_keys` where there is dropout."""
        ctx = self.context(batch["positions"], batch["segments"])
        if (keys := batch.get("dropout_keys")) is not None:
            dropout, of_adapter = (
                Dropout(rate, keys) if rate else None for rate in (self.dropout, self.adapter_dropout)
            )
            ctx = replace(ctx, dropout=dropout, adapter_dropout=of_adapter)
        if self.attention == "cudnn":  # behind the one document of a row there is padding alone, hidden by the order
            return replace(ctx, segments=None)
        return ctx

    def embed(self, params: Params, tokens: jax.Array, ctx: Context) -> jax.Array:
        """`[B, T]` int32 → `[B, T, D]` in the compute dtype; behind a prompt's virtual tokens, where `ctx` begins."""
        module = self.family.embed(self._in_memory, self.compute_dtype)
        return ctx.drop(_apply(module, params["embed"], tokens, ctx))

    def block(self, layer: Params, x: jax.Array, ctx: Context, cache: LayerCache | None = None) -> Output:
        """One layer: `[B, T, D]` → `[B, T, D]`. `layer` is a slice of `params["layers"]`."""
        return _apply(self._block, layer, x, ctx, cache)

    @property
    def aux(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the statistics that a block returns, see `Output.aux`; {} where it returns none."""
        return self._aux_shapes(self.family, cast(Hashable, self.config), jnp.dtype(self.compute_dtype))

    @staticmethod
    @lru_cache(maxsize=32)
    def _aux_shapes(
        family: Family, config: FamilyConfig, compute_dtype: np.dtype[Any]
    ) -> dict[str, jax.ShapeDtypeStruct]:
        plain = LM(family, config, Layout.single(), compute_dtype=compute_dtype)
        layer = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), plain.abstract()["layers"])

        def of_block(layer: Params) -> Any:
            x = jnp.zeros((1, 1, config.hidden_size), compute_dtype)
            ctx = replace(plain.context(jnp.zeros((1, 1), jnp.int32), begins=False), attention="xla")
            return dict(plain.block(layer, x, ctx.of_layer(jnp.int32(0))).aux)

        return jax.eval_shape(of_block, layer)

    def head(self, params: Params, x: jax.Array) -> jax.Array:
        """`[B, T, D]` → logits `[B, T, padded V]` in at least float32; those of the padding are −inf."""
        x = _apply(self._norm, params["norm"], x)
        module = self.family.head(self._in_memory, self.compute_dtype)
        z = _apply(module, params.get("head", {}), x, params.get("embed", {}))
        if self.vocab_padded == self.config.vocab_size:
            return z
        return jnp.where(jnp.arange(self.vocab_padded) < self.config.vocab_size, z, -jnp.inf)

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        ctx: Context,
        stack: Stack | None = None,
        cache: LayerCache | None = None,
    ) -> Output:
        """What the head reads, `[B, T, D]`: the embedding walked through every block by `stack`; and the sums of the
        statistics of all blocks.

        stack: by default a scan, or the pipeline that the layout has.

        Raises UserError for parameters that are not the model's.
        """
        self.check_params(params, also=BESIDE)
        of_layout = scan() if self.layout.stages == 1 else pipeline(self.layout, virtual=self.virtual_stages)
        walk = stack or of_layout
        x = self.embed(params, tokens, ctx)

        def block(layer: tuple[Params, jax.Array], x: jax.Array, ctx: Context, cache: LayerCache | None):
            return self.block(layer[0], x, ctx.of_layer(layer[1]), cache)

        layers = params["layers"]
        if FOLDER in params:
            k, v = projected_prefix(params[FOLDER])
            layers = tree.insert(layers, {"attn/prefix_k": k, "attn/prefix_v": v})
        out = walk(block, (layers, jnp.asarray(self.layer_order)), x, ctx, cache)
        return out._replace(x=_behind_prompt(out.x, tokens))

    def logits(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """The logits of the next token at every place: `[B, T]` int32 → `[B, T, V]` in at least float32.

        params: as `init` or `load_hf` gives them. tokens: ids below `config.vocab_size`. positions: `[B, T]` int32,
        default 0, 1, 2, …; segments: `[B, T]` int32, which document each token is of (attention does not cross
        documents), default one a row. May be jitted and differentiated; no mesh need be set.

        Raises UserError for parameters that are not the model's, and ValueError as `check_token_arrays` does.
        """
        check_token_arrays(tokens, {"positions": positions, "segments": segments}, self.config.vocab_size)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        x = self.hidden(params, tokens, self.context(positions, segments)).x
        return self.head(params, x)[..., : self.config.vocab_size]

    def losses(
        self,
        params: Params,
        batch: Mapping[str, jax.Array],
        stack: Stack | None = None,
        objective: Objective = CROSS_ENTROPY,
    ) -> Losses:
        """The losses of a batch's trained targets, summed: scalars in at least float32.

        batch: `tokens`, `targets`, `positions`, `segments` int32 and `loss_mask` float32, `[B, T]` each; also
        `dropout_keys`, `[B]` random keys, where something is dropped. Keys as `targets` draw them from the model (see
        `token_scores`).
        """
        out = self.hidden(params, batch["tokens"], self.batch_context(batch), stack)
        return self.head_losses(params, out.x, batch, objective, out.aux)

    def head_losses(
        self,
        params: Params,
        x: jax.Array,
        batch: Mapping[str, jax.Array],
        objective: Objective = CROSS_ENTROPY,
        aux: Leaves | None = None,
    ) -> Losses:
        """`losses` from what the head reads, `[B, T, D]`, and the sums of the statistics of all blocks; of `params`,
        what is not the head's may be missing."""
        return objective(self.scores(params, x, batch, objective), batch, aux or None)

    def scores(
        self, params: Params, x: jax.Array, batch: Mapping[str, jax.Array], objective: Objective = CROSS_ENTROPY
    ) -> TokenScores:
        """The scores of a batch's targets that `objective` reads, from what the head reads, `[B, T, D]`."""
        x = _behind_prompt(x, batch["targets"])
        batch_size, length, _ = x.shape
        chunks = loss_chunks(batch_size, length, self.vocab_padded, self.layout)
        return token_scores(
            lambda x: self.head(params, x),
            x,
            batch["targets"],
            self.layout,
            vocab_size=self.config.vocab_size,
            chunks=chunks,
            mean=reads_mean_logit(objective),
        )

    def new_cache(self, batch: int, slots: int) -> LayerCache:
        """An empty key-value cache for `batch` sequences of up to `slots` tokens."""
        c = self.config
        shape = (c.num_hidden_layers, batch, slots, c.num_key_value_heads, c.head_dim)
        return LayerCache(jnp.zeros(shape, self.compute_dtype), jnp.zeros(shape, self.compute_dtype))

    def parameter_count(self) -> int:
        """The number of parameters, padding not counted."""
        padding = self.vocab_padded - self.config.vocab_size
        matrices = 1 if self.config.tie_word_embeddings else 2
        whole = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.plain.abstract()))
        return whole - matrices * padding * self.config.hidden_size


def _behind_prompt(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """`x` `[B, n + T, D]` without the n virtual tokens in front of `tokens` `[B, T]`."""
    return x[:, x.shape[1] - tokens.shape[1] :]


def _apply(module: nn.Module, params: Params, *inputs: Any) -> Any:
    return module.apply({"params": params}, *inputs)
