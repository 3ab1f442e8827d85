"""What the tests of adapters have in common: a small model, its logits, and those of HF peft."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxllm.core.tree import Params
from jaxllm.models import LM
from tests.support.families import draw_config, draw_params, small_lm

TOKENS = np.random.default_rng(0).integers(0, 60, (2, 16))
TOLERANCE = 1e-4  # float32, of logits with a standard deviation above 1 (DESIGN, section 5)


def model(family: str = "llama", **changes: Any) -> tuple[LM, Params]:
    biases = dict(attention_bias=True, mlp_bias=True) if family == "llama" else {}
    lm = small_lm(draw_config(family, 1, **{**biases, "tie_word_embeddings": False, **changes}))
    return lm, draw_params(lm)


def logits(lm: LM, params: Params) -> np.ndarray:
    return np.asarray(jax.jit(lm.logits)(params, jnp.array(TOKENS)))


def torch_logits(module: Any) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor(TOKENS)).logits.numpy()


def dear(variants: dict[str, Any], *plain: str) -> list[Any]:
    """The variants but for `plain` in the full tier."""
    return [pytest.param(name, marks=[] if name in plain else pytest.mark.full) for name in variants]
