"""Hugging Face checkpoints, in and out."""

from pathlib import Path

from jax.typing import DTypeLike

from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.files import hub
from jaxllm.hf.export import save as save
from jaxllm.hf.weights import load_params as load_params
from jaxllm.hf.weights import read_model as read_model
from jaxllm.models.lm import LM


def load_hf(
    folder: str | Path,
    *,
    param_dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    layout: Layout | None = None,
) -> tuple[LM, Params]:
    """A model and its parameters from a Hugging Face checkpoint: `config.json` and safetensors.

    folder: a folder, or a name of the Hub such as "owner/name" or "owner/name@revision".
    param_dtype: of the parameters; None = each as in its file.
    compute_dtype: of activations and matrix products; None = bfloat16 on GPU, float32 on CPU.
    layout: the devices and what lies where; None = one device.

    Returns `(lm, params)`: `lm.logits(params, tokens)` is `[B, T]` int32 → `[B, T, V]` in at least float32.
    `params` is a nested dict of arrays; matrices are `[in, out]`, those of the layers `[layers, in, out]`.

    Raises UserError for a folder that is no checkpoint, is damaged, or holds what is not implemented.

    >>> import jax.numpy as jnp
    >>> lm, params = load_hf(folder)  # doctest: +SKIP
    >>> lm.logits(params, jnp.array([[1, 403, 407]])).shape  # doctest: +SKIP
    (1, 3, 512)
    """
    lm = read_model(hub.model_folder(folder, "weights"), layout or Layout.single(), param_dtype, compute_dtype)
    return lm, load_params(lm)


def save_hf(lm: LM, params: Params, folder: str | Path) -> None:
    """Writes a checkpoint that `transformers` loads, each tensor in the dtype of its parameter.

    A model of `load_hf` goes back into the names, files and `config.json` that it came in. An older export in
    `folder` is replaced; a folder that holds anything else is refused with a UserError, and left as it is.

    Raises UserError for parameters that are not the model's (other leaves, other shapes, or dtypes that are not floats)
    or not finite.

    >>> import tempfile, jax, jax.numpy as jnp
    >>> from jaxllm.core.mesh import Layout
    >>> from jaxllm.models import FAMILIES, LM
    >>> llama = FAMILIES["llama"]
    >>> size = dict(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    >>> lm = LM(llama, llama.config(**size, num_attention_heads=4), Layout.single())
    >>> params = lm.init(jax.random.key(0))
    >>> folder = tempfile.mkdtemp()
    >>> save_hf(lm, params, folder)
    >>> again, loaded = load_hf(folder)
    >>> loaded["layers"]["mlp"]["up"]["kernel"].shape
    (2, 32, 64)
    >>> again.logits(loaded, jnp.array([[1, 2, 3]])).shape
    (1, 3, 100)
    """
    save(lm, params, folder)
