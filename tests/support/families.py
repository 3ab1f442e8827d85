"""Random small models of every family: weights that make each part of the architecture matter."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import tree
from jaxllm.core.mesh import Layout, MeshConfig
from jaxllm.hf.export import save
from jaxllm.models import FAMILIES, LM
from jaxllm.models.family import FamilyConfig
from jaxllm.nn.quantized import STORED, dequantized

# A Llama's code computes a Mistral too, and need not be tested twice: its logits are in tests/hf/test_published.py,
# and its window in tests/models/families/test_windows.py.
COMPUTED = [name for name in FAMILIES if name != "mistral"]

# Values of fields that only some families have; windows within the rows of the tests.
NUMBERS: dict[str, list[Any]] = {
    "partial_rotary_factor": [0.5, 1.0],
    "sliding_window": [3, 7],
    "max_window_layers": [0, 1],
    "query_pre_attn_scalar": [64, 144],
    "attn_logit_softcapping": [5.0, 50.0, None],
    "final_logit_softcapping": [5.0, 30.0, None],
}


def draw_config(name: str, seed: int, **fixed: Any) -> FamilyConfig:
    """A small config: sizes of every kind, and for each switch or choice of the family some value."""
    draw = random.Random(f"{name} {seed}")
    schema = FAMILIES[name].config
    heads = draw.choice([2, 4, 8])
    values: dict[str, Any] = {
        "vocab_size": draw.choice([61, 64, 97]),
        "hidden_size": draw.choice([32, 48]),
        "intermediate_size": draw.choice([40, 64]),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([k for k in (1, 2, 4, 8) if heads % k == 0]),
        "head_dim": draw.choice([4, 8, 16]),
        "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "rope_theta": draw.choice([100.0, 10000.0, 500000.0]),
        "max_position_embeddings": 64,
    }
    for field, info in sorted(schema.model_fields.items()):
        if field != "type" and info.annotation is bool:
            values[field] = draw.random() < 0.5
        elif field != "type" and get_origin(info.annotation) is Literal:
            values[field] = draw.choice(get_args(info.annotation))
    for field, choices in NUMBERS.items():
        if field in schema.model_fields:
            values[field] = draw.choice(choices)
    return schema(**{**values, **fixed})


def small_lm(config: FamilyConfig, layout: Layout | None = None, dtype: str = "float32") -> LM:
    """A model of `config`, by default on one device."""
    return LM(FAMILIES[config.type], config, layout or Layout.single(), jnp.dtype(dtype), jnp.dtype(dtype))


def draw_params(lm: LM, seed: int = 0) -> dict[str, Any]:
    """Parameters under which queries and keys are far from equal, logits have a standard deviation above 1, biases
    and norms are not neutral, and the residual stream starts small enough for eps to matter.
    """
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.integer):  # which tokens an adapter has rows of
            return lm.extra[path].draw(jax.random.key(0), {})
        x = rng.standard_normal(leaf.shape)
        *_, parent, kind = path.split("/")
        if kind == "kernel":
            x *= {"q": 1.6, "k": 1.6, "head": 2.0}.get(parent, 1.0) / np.sqrt(leaf.shape[-2])
        elif kind == "table":
            x *= 0.3
        elif kind == "scale":
            x = 1.2 + 0.3 * x
        else:
            x *= 0.5
        return jnp.asarray(x, leaf.dtype)

    return tree.map_with_path(draw, lm.abstract())


def write_checkpoint(folder: Path, config: FamilyConfig, seed: int = 0, dtype: str = "float32") -> Path:
    """A Hugging Face folder with random weights of `config`."""
    lm = small_lm(config, dtype=dtype)
    save(lm, draw_params(lm, seed), folder)
    return folder


def transformers_model(config: FamilyConfig, params: dict[str, Any], folder: Path) -> Any:
    """transformers' model of `config` and `params`, through `folder` as the export writes it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    save(small_lm(config), params, folder)
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="float32", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def mesh_layout(**sizes: int) -> Layout:
    """A layout over all devices of the tests, one where no size is given."""
    return Layout.of(MeshConfig(**{"fsdp": 1, **sizes}), jax.devices()[: int(np.prod(list(sizes.values())))])


def quantized(lm: LM, params: dict[str, Any]) -> dict[str, Any]:
    """The same parameters as `lm` stores them."""
    wanted, stored = tree.flatten(lm.abstract()), dict[str, Any]()
    for path, leaf in tree.flatten(params).items():
        folder = path.rpartition("/")[0]
        if path in wanted:
            stored[path] = leaf
        else:
            shapes = {name: wanted[f"{folder}/{name}"] for name in lm.quantization.stored(path, leaf.shape)}
            stored |= {f"{folder}/{name}": x for name, x in lm.quantization.quantized(leaf, shapes).items()}
    return tree.insert({}, stored)


def read_back(lm: LM, params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of `lm.plain` that have the matrices which `lm` computes with when it stores `params`."""
    leaves, stored = tree.flatten(params), quantized(lm, params)
    for path in leaves:
        if lm.quantization.replaces(path):
            folder = tree.at(stored, path.rpartition("/")[0])
            matrices = jax.vmap(dequantized)({name: leaf for name, leaf in folder.items() if name in STORED})
            leaves[path] = matrices.astype(leaves[path].dtype)
    return tree.insert({}, leaves)


def on_layout(lm: LM, layout: Layout, params: dict[str, Any]) -> tuple[LM, dict[str, Any]]:
    """The same model on another layout: its vocabulary padded with zeros, everything else the same numbers."""
    moved = replace(lm, layout=layout)

    def place(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        pads = [(0, size - old) for size, old in zip(wanted.shape, leaf.shape, strict=True)]
        return jax.device_put(np.pad(np.asarray(leaf), pads) if pads else leaf, wanted.sharding)

    return moved, jax.tree.map(place, params, moved.abstract())
