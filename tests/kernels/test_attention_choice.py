"""The form of attention that a run takes, and the test that it must pass first."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.kernels import attention_choice
from jaxllm.kernels.attention import causal_attention, plain_attention
from jaxllm.kernels.attention_choice import AttentionNeeds, choose_attention, fault, obstacle
from tests.support.families import mesh_layout

FLASH, PLAIN = partial(causal_attention, "flash"), partial(causal_attention, "xla")


def needs(layout: Layout | None = None, **changes: Any) -> AttentionNeeds:
    values = dict(heads=4, kv_heads=2, head_dim=16, dtype=np.float32, packed=True)
    return AttentionNeeds(layout or Layout.single(), **{**values, **changes})


@pytest.mark.optimized
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one a row"])
@pytest.mark.parametrize("form", [PLAIN, FLASH], ids=["xla", "flash"])
def test_every_form_passes(form, packed):
    assert fault(form, needs(packed=packed)) is None


@pytest.mark.optimized
def test_every_form_passes_on_a_mesh():
    layout = mesh_layout(fsdp=2, tensor=4).replace(act_kv_heads=())
    assert fault(FLASH, needs(layout, heads=8)) is None
    assert fault(PLAIN, needs(layout, heads=8)) is None


@pytest.mark.optimized
@pytest.mark.parametrize("form", [PLAIN, FLASH], ids=["xla", "flash"])
def test_every_form_passes_where_the_length_is_split(form):
    """Over three devices, in which documents begin and end; a row of 258."""
    assert fault(form, needs(mesh_layout(context=3, data=2))) is None


def across_documents(q, k, v, segments, layout, spec):
    return plain_attention(q, k, v)


def later_tokens(q, k, v, segments, layout, spec):
    return plain_attention(q[:, ::-1], k[:, ::-1], v[:, ::-1], segments)[:, ::-1]


def other_rows(q, k, v, segments, layout, spec):
    return plain_attention(q, k, v, segments) + 1e-6 * jnp.mean(v, axis=(0, 1, 2))


def gradient_of_others(q, k, v, segments, layout, spec):
    """The result is right, and its gradient gets something of every token."""
    leak = 1e-6 * jnp.sum(jax.lax.stop_gradient(q))
    return plain_attention(q, k, v, segments) + leak * (v - jax.lax.stop_gradient(v))[:, :, :1]


def another_scale(q, k, v, segments, layout, spec):
    return plain_attention(1.2 * q, k, v, segments)


def other_heads(q, k, v, segments, layout, spec):
    return plain_attention(q, k[:, :, ::-1], v[:, :, ::-1], segments)


def not_a_number(q, k, v, segments, layout, spec):
    return plain_attention(q, k, v, segments) * jnp.nan


def does_not_run(q, k, v, segments, layout, spec):
    raise NotImplementedError("no such kernel\non this card")


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("attention", "packed", "said"),
    [
        (across_documents, True, "leaks: document 1 changes another document's result"),
        (later_tokens, False, "leaks: padding changes another document's result"),
        (other_rows, True, "leaks: padding changes another document's result"),
        (gradient_of_others, True, "leaks: padding changes another document's dv"),
        (another_scale, True, "is wrong: result misses the plain form's by"),
        (other_heads, True, "is wrong: result misses the plain form's by"),
        (not_a_number, True, "is wrong: result misses the plain form's by nan"),
        (does_not_run, True, "fails here: no such kernel"),
    ],
)
def test_each_fault_is_found(attention, packed, said):
    """On two rows, the second of which is no copy of the first once a document of the first is changed."""
    assert (fault(attention, needs(mesh_layout(data=2), packed=packed)) or "").startswith(said)


class Card:
    """What the choice asks of a device."""

    platform = "gpu"

    def __init__(self, capability: str) -> None:
        self.compute_capability = capability


class CardLayout:
    def __init__(self, capability: str, parts: int) -> None:
        self.mesh = type("Mesh", (), {"devices": np.array([Card(capability)])})
        self.parts = parts

    def size(self, name: str) -> int:
        return {"act_inner_length": self.parts}[name]


def on_card(capability: str = "9.0", parts: int = 1, **changes: Any) -> AttentionNeeds:
    """parts: of the length, on so many devices."""
    layout: Any = CardLayout(capability, parts)
    return needs(layout, **{**dict(dtype=jnp.bfloat16, head_dim=128), **changes})


@pytest.mark.parametrize(
    ("form", "case", "said"),
    [
        ("cudnn", on_card(packed=False), None),
        ("cudnn", on_card(), "data.packing"),
        ("cudnn", on_card(packed=False, head_dim=256), None),
        ("cudnn", on_card("8.0", packed=False, head_dim=256), "up to 128"),
        ("cudnn", on_card(packed=False, head_dim=100), "multiple of 8"),
        ("cudnn", on_card(packed=False, dtype=np.float32), "train.compute_dtype is float32"),
        ("cudnn", on_card(packed=False, parts=2), "begin behind the first key, as mesh.context splits them"),
        ("flash", on_card(), None),
        ("flash", on_card(packed=False, parts=2), None),
        ("flash", on_card("8.6", head_dim=80, dtype=np.float16), None),
        ("flash", on_card("7.5"), "since Ampere"),
        ("flash", on_card(head_dim=512), "wider than 256"),
        ("flash", needs(), "needs an NVIDIA GPU, and this is a cpu"),
        ("xla", on_card("7.5", dtype=np.float64), None),
    ],
)
def test_what_speaks_against_a_form(form, case, said):
    reason = obstacle(form, case)
    assert (reason is None) if said is None else said in (reason or "")


def test_auto_takes_the_fastest_that_passes(monkeypatch):
    """In the order of speed; a form that fails its test is passed over and said."""
    tested = []

    def faulty(attention, needs):
        tested.append(attention.args[0])
        return {"cudnn": None, "flash": "leaks: document 1", "xla": None}[tested[-1]]

    monkeypatch.setattr(attention_choice, "fault", faulty)
    assert choose_attention("auto", on_card(packed=False)).form == "cudnn"
    choice = choose_attention("auto", on_card(packed=True))
    assert choice.form == "xla"
    assert "cudnn: does not keep documents apart" in str(choice)
    assert "flash: leaks: document 1" in str(choice)
    with pytest.raises(UserError, match=r"train.attention: flash cannot be used here. flash: leaks: document 1.*auto"):
        choose_attention("flash", on_card())
    assert tested == ["cudnn", "flash", "xla", "flash"]


def test_on_a_cpu_it_is_the_plain_form():
    choice = choose_attention("auto", needs())
    assert str(choice) == (
        "xla, tested for leaks between documents; cudnn and flash: needs an NVIDIA GPU, and this is a cpu"
    )


CARD_SHAPES = [(8, 8, 64), (14, 2, 64), (32, 8, 128), (8, 1, 128), (4, 2, 80), (4, 2, 256)]


@pytest.mark.gpu
@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", CARD_SHAPES, ids=str)
@pytest.mark.parametrize("form", ["flash", "cudnn", "xla"])
def test_every_form_passes_on_a_card(form, shape, dtype):
    """No leak by a bit, and the plain form's values and gradients."""
    for packed in (True, False):
        case = AttentionNeeds(Layout.single(), *shape, dtype, packed)
        if obstacle(form, case) is None:
            assert fault(partial(causal_attention, form), case) is None


@pytest.mark.gpu
def test_a_card_gets_kernels():
    assert choose_attention("auto", AttentionNeeds(Layout.single(), 32, 8, 128, "bfloat16", True)).form == "flash"
    assert choose_attention("auto", AttentionNeeds(Layout.single(), 32, 8, 128, "bfloat16", False)).form == "cudnn"
