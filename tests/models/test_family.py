"""What a family may say of its model, and what is not dropped in silence."""

from dataclasses import replace

import flax.linen as nn
import jax.numpy as jnp
import pytest

from jaxllm.hf.config import parse_config, write_config
from jaxllm.models.family import Output
from tests.support.families import draw_config, small_lm


class Counting(nn.Module):
    """A block with statistics, and no parameters."""

    def __call__(self, x, ctx, cache=None):
        return Output(x, aux={"tokens": jnp.ones(())}, cache=cache)


def test_statistics_of_a_block_are_not_dropped():
    lm = small_lm(draw_config("llama", 0))
    counting = replace(lm, family=replace(lm.family, block=lambda config, dtype: Counting()))
    x = jnp.zeros((1, 2, lm.config.hidden_size))
    with pytest.raises(NotImplementedError, match="llama: no training step sums the statistics"):
        counting.block({}, x, lm.context(jnp.zeros((1, 2), jnp.int32)))


def test_a_field_goes_by_its_name_in_the_file_both_ways():
    raw = {"model_type": "gemma2", "hidden_activation": "gelu", "num_hidden_layers": 2}
    family, config = parse_config(raw)
    assert config.hidden_act == "gelu"
    changed = config.model_copy(update={"hidden_act": "relu"})
    assert write_config(family, changed, source=raw) == {**raw, "hidden_activation": "relu"}
    assert write_config(family, changed)["hidden_activation"] == "relu"
    assert "hidden_act" not in write_config(family, changed)


def test_a_config_says_what_its_layer_types_lack():
    with pytest.raises(ValueError, match="layer_types has 1 entries and num_hidden_layers is 2"):
        draw_config("qwen3", 0, layer_types=("full_attention",))
    with pytest.raises(ValueError, match="sliding_attention, which needs a sliding_window"):
        draw_config("gemma2", 0, sliding_window=None)
