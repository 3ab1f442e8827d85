"""What prompt tuning, p-tuning and prefix tuning share: virtual tokens in front of every document.

Their files have what the model is given in place of the tokens, and no encoder that makes it.
"""

from collections.abc import Iterator
from typing import Any

import jax

from jaxllm.core.config import Conflict
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import MeshConfig
from jaxllm.models.lm import LM, ExtraLeaf
from jaxllm.peft.files import AdapterFiles

# The tensor in their files.
TENSOR = "prompt_embeddings"


def files(peft_type: str) -> AdapterFiles:
    """What `adapter_config.json` says of such an adapter."""
    return AdapterFiles(
        peft_type,
        described=("num_virtual_tokens",),
        inert=(
            *("num_attention_heads", "num_layers", "token_dim", "num_transformer_submodules"),
            *("encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type"),
            *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
            *("prefix_projection", "init_weights"),
        ),
    )


def description(lm: LM) -> dict[str, Any]:
    """What `adapter_config.json` says of the model beside them."""
    c = lm.config
    return {
        "num_transformer_submodules": 1,
        "num_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "token_dim": c.hidden_size,
    }


def context_conflicts(method: str, mesh: MeshConfig) -> Iterator[Conflict]:
    """What contradicts a mesh that splits rows."""
    if mesh.context != 1:
        yield Conflict(
            f"mesh.context is {mesh.context}, whose devices have equal parts of each row, and peft.type is "
            f"{method}, which puts virtual tokens in front of it",
            "set context to 1, or choose another method, such as lora",
        )


def check_room(method: str, count: int, lm: LM) -> None:
    """Raises UserError for a model that cannot have `count` virtual tokens in front of a text."""
    if lm.config.rope.by_length:
        raise UserError(
            f"peft.type is {method}, and the angles of the rope {lm.config.rope.type!r} depend on the length of "
            "a text, which texts that share virtual tokens do not agree on; choose another method, such as lora"
        )
    if count >= lm.config.longest:
        raise UserError(
            f"peft.num_virtual_tokens is {count}, and the model has {lm.config.longest} "
            "positions for them and the text; set it lower"
        )


def uniform(shape: tuple[int, ...], bound: float, dtype: Any) -> ExtraLeaf:
    """A leaf that every device holds, drawn between ±bound."""
    return ExtraLeaf((None,) * len(shape), lambda key, _: jax.random.uniform(key, shape, dtype, -bound, bound))
