"""What one call of attention computes, whichever form computes it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AttentionSpec(NamedTuple):
    """`softmax(score(q kᵀ)) v`: how scores follow from products, and which keys a query sees.

    scale: what products are multiplied by; None = 1 / sqrt(head_dim).
    soft_cap: c, where a score s becomes c · tanh(s / c) (Gemma Team, arXiv 2408.00118, section 2).
    window: how many keys a query sees, its own one of them, as transformers counts a sliding window. An int where it
        is known when the program is compiled, a scalar int32 where it is data. At least 1.
    slopes: `[H]`, what each head subtracts from a score for each token between query and key: ALiBi (Press et al.,
        arXiv 2108.12409). Constants: they have no gradient.
    sinks: `[H]`, a score of each head that joins the denominator of the softmax, with no value.
    prefix: the number of keys at the start of a row that have no query. shared: the number of keys after them that
        belong to virtual tokens. Every later query sees both, whatever its segment. Distances count them as the start
        of each document.
    """

    scale: float | None = None
    soft_cap: float | None = None
    window: jax.Array | int | None = None
    slopes: jax.Array | None = None
    sinks: jax.Array | None = None
    shared: int = 0
    prefix: int = 0

    @property
    def in_front(self) -> int:
        """The keys in front that every query behind them sees."""
        return self.prefix + self.shared

    @property
    def asks_distances(self) -> bool:
        """Whether scores or the keys seen depend on how far apart tokens stand."""
        return self.window is not None or self.slopes is not None

    def within(self, keys: int) -> "AttentionSpec":
        """The same for rows of `keys` in all, which a window may leave whole."""
        whole = isinstance(self.window, int) and self.window >= keys
        return self._replace(window=None) if whole else self

    def capped(self, scores: jax.Array) -> jax.Array:
        """Scores under the soft cap."""
        return scores if self.soft_cap is None else self.soft_cap * jnp.tanh(scores / self.soft_cap)

    def distances(self, at: jax.Array, segments: jax.Array | None, keys: int) -> jax.Array | None:
        """`[B or 1, T, keys]` int32: by how many tokens each key stands before each query; None where nothing asks.

        at: `[T]`, the key at which each query stands. segments: `[B, keys]`, None = one a row. Tokens of a document
        stand together.
        """
        if not self.asks_distances:
            return None
        numbers = jnp.arange(keys)
        apart = (at[:, None] - numbers)[None]
        if segments is None or not self.in_front:
            return apart
        changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        begins = jax.lax.cummax(jnp.where(changes, numbers, 0), axis=1)
        begins = jnp.maximum(jnp.take(begins, at, axis=1, mode="clip"), self.in_front)
        in_document = at - begins + self.in_front
        return jnp.where(numbers < self.in_front, in_document[:, :, None] - numbers, apart)


PLAIN = AttentionSpec()
"""The attention of a Llama: nothing but scaled products, in causal order."""
