"""Fitting heads to the tensor axis, and layers to the stages of a pipeline."""

import pytest

from jaxllm.core.errors import UserError
from jaxllm.models.fit_layout import fit_layout
from tests.support.families import draw_config, mesh_layout


def config(heads, kv_heads):
    return draw_config("llama", 0, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4)


def test_heads_that_divide_leave_the_layout_alone():
    layout = mesh_layout(fsdp=2, tensor=4)
    assert fit_layout(config(8, 4), layout) is layout


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (8, 1), (24, 6)])
def test_key_value_heads_that_do_not_divide_are_replicated(heads, kv_heads, caplog):
    caplog.set_level("INFO")
    layout = mesh_layout(fsdp=2, tensor=4)
    fitted = fit_layout(config(heads, kv_heads), layout)
    assert fitted.rules == {**layout.rules, "kv_heads": (), "act_kv_heads": ()}
    assert fitted.mesh is layout.mesh
    assert f"{kv_heads} key-value heads" in caplog.text


@pytest.mark.parametrize(
    ("heads", "ways", "nearest"), [(6, 4, "3 and 6"), (4, 8, "4"), (12, 8, "6 and 12"), (9, 2, "1 and 3")]
)
def test_query_heads_that_do_not_divide_are_refused_with_the_nearest_sizes(heads, ways, nearest):
    with pytest.raises(UserError) as error:
        fit_layout(config(heads, 1), mesh_layout(tensor=ways))
    assert f"{heads} attention heads" in str(error.value)
    assert f"mesh.tensor = {ways}" in str(error.value)
    assert str(error.value).endswith(f"that work: {nearest}")


@pytest.mark.parametrize(("layers", "stages", "nearest"), [(6, 4, "3 and 6"), (4, 8, "4"), (9, 2, "1 and 3")])
def test_layers_that_do_not_divide_over_a_pipeline_are_refused_with_the_nearest_sizes(layers, stages, nearest):
    with pytest.raises(UserError) as error:
        fit_layout(draw_config("llama", 0, num_hidden_layers=layers), mesh_layout(pipeline=stages))
    assert f"{layers} layers" in str(error.value)
    assert f"mesh.pipeline = {stages}" in str(error.value)
    assert str(error.value).endswith(f"that work: {nearest}")


def test_a_user_may_keep_the_heads_whole():
    layout = mesh_layout(tensor=8).replace(heads=(), act_heads=(), kv_heads=(), act_kv_heads=())
    assert fit_layout(config(6, 3), layout) is layout
