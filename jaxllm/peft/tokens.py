"""Rows of the embedding that train in an adapter, and stand in its files in place of the model's, as HF PEFT's
`trainable_tokens_delta`. The head of a model that has none of its own reads them too.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxllm.core import tree
from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.tree import Params
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.nn.embed import TOKEN_IDS, TOKEN_ROWS
from jaxllm.peft.files import PREFIX, Part
from jaxllm.peft.modules import modules

TABLE = "embed/table"


def token_leaves(lm: LM, ids: Sequence[int]) -> dict[str, ExtraLeaf]:
    """The rows of the tokens `ids`, by the paths of their leaves; at the start they are the model's.

    Raises UserError for a token that the model does not have.
    """
    if (largest := max(ids)) >= lm.config.vocab_size:
        raise UserError(
            f"peft.trainable_token_indices has {largest}, and the embedding has {lm.config.vocab_size} rows; "
            "the ids of tokens count from 0"
        )
    dtype, places = at_least_float32(tree.at(lm.abstract(), TABLE).dtype), jnp.array(ids, jnp.int32)

    def rows(_: jax.Array, params: Params) -> jax.Array:
        return tree.at(params, TABLE)[places].astype(dtype)

    return {
        f"embed/{TOKEN_ROWS}": ExtraLeaf((None, None), rows),
        f"embed/{TOKEN_IDS}": ExtraLeaf((None,), lambda *_: places, frozen=True),
    }


def token_part(lm: LM, ids: Sequence[int]) -> Part:
    """The tensor of the files that has them."""
    name = next(module.names[0] for module in modules(lm) if module.path == TABLE)
    tensor = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
    return Part(f"embed/{TOKEN_ROWS}", (), tensor, (len(ids), lm.config.hidden_size))
