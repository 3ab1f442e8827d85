"""Keys that several methods have, each with its meaning."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from jaxllm.peft.layer_sampling import LayerDraws

ALL_LINEAR = "all-linear"
Bias = Literal["none", "all", "lora_only"]


def _means(description: str) -> Any:
    return Field(description=description)


TargetModules = Annotated[
    str | tuple[str, ...],
    _means(
        "the matrices that get them: all-linear (all of the layers), a list of names such as [q_proj, v_proj], or a "
        "regular expression of the whole name, such as '.*layers\\.[0-3]\\..*_proj'; with lora, embed_tokens and "
        "lm_head are matrices too"
    ),
]
ModulesToSave = Annotated[
    tuple[str, ...],
    _means(
        "modules that train as a whole, such as [lm_head, embed_tokens] or [mlp], and are in the adapter's files; as "
        "in HF PEFT, a name also means those that it is the end of: norm all norms of a Llama, model.norm the last one"
    ),
]
SaveEmbeddingLayers = Annotated[
    bool,
    _means(
        "whether the adapter's files hold the embedding and the head too, which do not train, as for a model whose "
        "vocabulary was resized before"
    ),
]
Lisa = Annotated[
    LayerDraws | None,
    _means("the adapters of a few layers train at a time, as with type: lisa; default: those of all layers"),
]
LayersToTransform = Annotated[
    tuple[NonNegativeInt, ...] | None, _means("the layers that get them, counted from 0; default: all")
]
TrainedBiases = Annotated[
    Bias, _means("the biases that train: none, all of the model, or those of the matrices with an adapter")
]
LoraDropout = Annotated[float, Field(ge=0, lt=1, description="share of their input that is dropped in training")]
NumVirtualTokens = Annotated[PositiveInt, _means("virtual tokens in front of every document")]

# What float32 holds, multiplied by a weight and divided by the root of a rank.
Positive = Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
# Above the width of any matrix it is for.
Rank = Annotated[int, Field(ge=1, le=2**16)]
