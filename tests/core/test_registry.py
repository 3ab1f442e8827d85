"""Registering and looking up components."""

import pytest

from jaxllm.core.errors import UserError
from jaxllm.core.registry import Registry


@pytest.fixture
def shapes() -> Registry[str]:
    registry = Registry[str]("shape")
    registry.add("square", "□")
    registry.add("circle", "○")
    return registry


def test_components_keep_their_order(shapes):
    assert list(shapes) == ["square", "circle"]
    assert len(shapes) == 2
    assert "circle" in shapes
    assert "cone" not in shapes
    assert shapes["circle"] == "○"


def test_an_unknown_name_names_the_closest(shapes):
    with pytest.raises(UserError) as caught:
        shapes["sqare"]
    assert str(caught.value) == "unknown shape 'sqare'. Did you mean 'square'? Known: circle, square."
    with pytest.raises(UserError) as caught:
        shapes["x"]
    assert str(caught.value) == "unknown shape 'x'. Known: circle, square."


def test_a_name_is_registered_once(shapes):
    with pytest.raises(ValueError, match="the shape 'circle' is registered twice"):
        shapes.add("circle", "◯")
    assert shapes["circle"] == "○"
