"""Families whose tokens see a window: the logits of transformers, decoding, and rows that are longer than it."""

import jax
import numpy as np
import pytest
import torch

from jaxllm.generate.decode import Decoder
from jaxllm.kernels.attention_spec import AttentionSpec
from tests.support.families import draw_config, draw_params, small_lm, transformers_model

WINDOW, LENGTH = 5, 16


def made(family):
    config = draw_config(family, 0, sliding_window=WINDOW, num_attention_heads=4, num_key_value_heads=2)
    lm = small_lm(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, LENGTH))
    return lm, draw_params(lm), tokens, jax.jit(lm.logits)


@pytest.fixture(scope="module")
def windowed():
    return made("mistral")


@pytest.mark.parametrize("family", ["mistral", "phi3"])
def test_logits_are_those_of_transformers(family, windowed, tmp_path):
    lm, params, tokens, logits = windowed if family == "mistral" else made(family)
    module = transformers_model(lm.config, params, tmp_path / "model")
    with torch.no_grad():
        theirs = module(torch.tensor(tokens)).logits.numpy()
    assert theirs.std() >= 1
    np.testing.assert_allclose(logits(params, tokens), theirs, rtol=0, atol=1e-4)


def test_the_form_of_attention_is_chosen_for_the_window(windowed):
    assert windowed[0].attention_needs(packed=False).spec == AttentionSpec(window=WINDOW)


def test_documents_of_a_row_have_windows_of_their_own(windowed):
    lm, params, tokens, logits = windowed
    packed = np.where(np.arange(LENGTH) < 7, tokens[:1], np.roll(tokens[1:], 7, axis=1))
    positions = np.where(np.arange(LENGTH) < 7, np.arange(LENGTH), np.arange(LENGTH) - 7)[None].astype(np.int32)
    segments = np.where(np.arange(LENGTH) < 7, 1, 2)[None].astype(np.int32)
    together = np.asarray(jax.jit(lm.logits)(params, packed, positions=positions, segments=segments))
    alone = np.asarray(logits(params, tokens))
    np.testing.assert_allclose(together[0, :7], alone[0, :7], rtol=0, atol=1e-4)
    np.testing.assert_allclose(together[0, 7:], alone[1, : LENGTH - 7], rtol=0, atol=1e-4)


def test_decoding_goes_beyond_the_window(windowed):
    """Prompts that are shorter and longer than it, together; the shorter is padded."""
    lm, params, tokens, logits = windowed
    prompts = [tokens[0, :3].tolist(), tokens[1, :9].tolist()]
    for prompt, new in zip(prompts, Decoder(lm)(params, prompts, max_new_tokens=6), strict=True):
        row = np.zeros((2, LENGTH), np.int64)
        row[0, : len(prompt) + 6] = prompt + new
        greedy = np.asarray(logits(params, row))[0].argmax(axis=-1)
        assert new == greedy[len(prompt) - 1 : len(prompt) + 5].tolist()


def test_a_window_that_no_row_leaves_costs_nothing(windowed):
    lm, params, tokens, _ = windowed
    wide, none = (small_lm(lm.config.model_copy(update={"sliding_window": window})) for window in (LENGTH, None))
    program, expected = (str(jax.make_jaxpr(lm.logits)(params, tokens)) for lm in (wide, none))
    assert program == expected
