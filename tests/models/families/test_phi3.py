"""What Phi-3 has beside a Llama: matrices that are several in one, and a window that rows must fit into."""

import jax
import numpy as np
import pytest
import torch

from jaxllm.core.errors import UserError
from jaxllm.generate.decode import Decoder
from tests.support.collectives import collectives, counted
from tests.support.families import draw_config, draw_params, mesh_layout, on_layout, small_lm, transformers_model

WINDOW = 16
SIZES = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False)


def test_rows_as_long_as_the_window_are_theirs_and_longer_ones_are_refused(tmp_path):
    lm = small_lm(draw_config("phi3", 0, sliding_window=WINDOW))
    params = draw_params(lm)
    tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, (2, WINDOW + 1))
    module = transformers_model(lm.config, params, tmp_path / "model")
    with torch.no_grad():
        theirs = module(torch.tensor(tokens)).logits.numpy()
    # The last token is the first that does not see all before it.
    np.testing.assert_allclose(lm.logits(params, tokens[:, :-1]), theirs[:, :-1], rtol=0, atol=1e-4)
    assert lm.config.longest == WINDOW
    with pytest.raises(UserError, match="a row of 17 tokens is longer than the 16 of the model's sliding window"):
        lm.logits(params, tokens)


def test_a_prompt_that_fits_into_the_window_is_completed_up_to_its_end():
    """Though it is padded to more tokens than the window has."""
    lm = small_lm(draw_config("phi3", 0, sliding_window=WINDOW - 1))
    params = draw_params(lm)
    prompt = np.random.default_rng(0).integers(0, lm.config.vocab_size, 10).tolist()
    (new,) = Decoder(lm)(params, [prompt], max_new_tokens=9)
    greedy = np.argmax(lm.logits(params, np.array([prompt + new]))[0], axis=-1)
    assert len(prompt) + len(new) == WINDOW - 1
    assert new == greedy[len(prompt) - 1 : -1].tolist()


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
