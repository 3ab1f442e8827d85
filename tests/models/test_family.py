"""What a family may say of its model, and what is not dropped in silence."""

import pytest

from jaxllm.core.errors import UserError
from jaxllm.hf.config import parse_config, write_config
from jaxllm.models.layer_types import ALL, windows
from tests.support.families import draw_config


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
    with pytest.raises(ValueError, match="sliding_attention and use_sliding_window is false; set it to true"):
        draw_config("qwen3", 0, layer_types=("sliding_attention",) * 2, sliding_window=3, use_sliding_window=False)


@pytest.mark.parametrize("window", [2**30 + 1, 2**31 - 1])
def test_a_window_wider_than_any_row_is_no_limit(window):
    kinds = ("sliding_attention", "full_attention")
    config = draw_config("gemma2", 0, sliding_window=window, layer_types=kinds)
    assert windows(config).window.tolist() == [ALL, ALL]


@pytest.mark.parametrize(
    ("model_type", "window", "kinds", "read"),
    [
        ("llama", None, ["full_attention", "full_attention"], True),
        ("llama", None, ["full_attention", "chunked_attention"], False),
        ("mistral", 8, ["sliding_attention", "sliding_attention"], True),
        ("mistral", 8, ["sliding_attention", "full_attention"], False),
        ("phi3", 8, "sliding_attention", False),
    ],
)
def test_layer_types_of_a_family_without_them_must_say_what_it_is(model_type, window, kinds, read):
    raw = {"model_type": model_type, "sliding_window": window, "num_hidden_layers": 2}
    if read:
        assert parse_config({**raw, "layer_types": kinds}) == parse_config(raw)
    else:
        with pytest.raises(UserError, match="does not implement layer_types = "):
            parse_config({**raw, "layer_types": kinds})
