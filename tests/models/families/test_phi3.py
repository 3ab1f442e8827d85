"""What Phi-3 has beside a Llama: matrices that are several in one."""

import jax
import numpy as np
import pytest

from tests.support.collectives import collectives, counted
from tests.support.families import draw_config, draw_params, mesh_layout, on_layout, small_lm

SIZES = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)


@pytest.mark.optimized
def test_a_share_of_the_columns_has_what_belongs_together():
    """Over a tensor axis as many sums are sent as by a Llama, whose matrices are apart, and nothing else."""
    sent = {}
    for family, biases in ("phi3", {}), ("llama", dict(attention_bias=False, mlp_bias=False)):
        layout = mesh_layout(tensor=2)
        lm = small_lm(draw_config(family, 0, **SIZES, **biases))
        lm, params = on_layout(lm, layout, draw_params(lm))
        step = jax.jit(jax.grad(lambda params, lm=lm: lm.logits(params, np.zeros((2, 8), np.int32)).std()))
        text = step.lower(params).compile().as_text()
        sent[family] = counted(collectives(text, layout.mesh.shape))
    assert sent["phi3"].keys() <= sent["llama"].keys()
    assert all(sent["phi3"][kind] <= count for kind, count in sent["llama"].items())
