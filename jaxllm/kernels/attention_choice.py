"""Which form of attention a run computes with: one that works here, and that was seen not to leak."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxllm.core.dtypes import at_least_float32
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.kernels.attention import AttentionForm, attend, causal_attention, causal_mask, lacks
from jaxllm.kernels.attention_spec import PLAIN, AttentionSpec

AskedAttention = Literal["auto", AttentionForm]

# The fastest first: cuDNN's kernel is NVIDIA's own, ours can tell documents apart, plain JAX holds all scores.
BY_SPEED: tuple[AttentionForm, ...] = ("cudnn", "flash", "xla")
assert set(BY_SPEED) == set(get_args(AttentionForm))

# Tokens in a row of the test: more than one tile of any form.
TEST_LENGTH = 256
# Of the largest value: the weights' rounding to bfloat16 stays well within, a wrong mask, scale or head is far out.
TEST_TOLERANCE = 2.0**-5


@dataclass(frozen=True)
class AttentionNeeds:
    """What attention is to be computed for.

    packed: whether a row may hold several documents. virtual: what stands in front of all of them, virtual tokens
    ("prompt") or their keys and values alone ("prefix"). spec: what the model's attention computes, by any values of
    its arrays; what is in front is said by `virtual`.
    """

    layout: Layout
    heads: int
    kv_heads: int
    head_dim: int
    dtype: DTypeLike
    packed: bool
    virtual: Literal["none", "prompt", "prefix"] = "none"
    spec: AttentionSpec = PLAIN

    @property
    def test_spec(self) -> AttentionSpec:
        """`spec` with numbers that show in a test of few tokens and of scores near 1."""
        spec = self.spec
        by_head: Any = np.linspace(0.1, 0.8, self.heads, dtype=np.float32)
        traced: Any = np.int32(48)
        return spec._replace(
            soft_cap=None if spec.soft_cap is None else 1.0,
            window=None if spec.window is None else 48 if isinstance(spec.window, int) else traced,
            slopes=None if spec.slopes is None else by_head,
            sinks=None if spec.sinks is None else 4 * by_head,
        )


@dataclass(frozen=True)
class AttentionChoice:
    """The form chosen, and why the faster ones were not: `{reason: forms}`. tested: whether it was run on a test."""

    form: AttentionForm
    others: Mapping[str, list[str]]
    tested: bool = True

    def __str__(self) -> str:
        tested = ", tested for leaks between documents" if self.tested else ""
        return f"{self.form}{tested}" + (f"; {_said(self.others)}" if self.others else "")


def _said(refused: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{' and '.join(forms)}: {reason}" for reason, forms in refused.items())


def choose_attention(asked: AskedAttention, needs: AttentionNeeds) -> AttentionChoice:
    """The form `asked` for, or for "auto" the fastest that works on the devices of the layout and is without `fault`.

    Raises UserError with the reason if there is none.
    """
    forms = BY_SPEED if asked == "auto" else (asked,)
    form, refused = _first(forms, lambda form: obstacle(form, needs) or fault(partial(causal_attention, form), needs))
    if form is None:
        raise _none(asked, refused)
    return AttentionChoice(form, refused)


def plan_attention(asked: AskedAttention, needs: AttentionNeeds) -> AttentionChoice:
    """The form to compile with for devices that are not here, so that nothing is run on them.

    cuDNN's form cannot be compiled without the card: where it is asked for, the next takes its place.
    Raises UserError where `choose_attention` would for the kind of device.
    """
    forms = BY_SPEED if asked in ("auto", "cudnn") else (asked,)
    wrong = {form: obstacle(form, needs) for form in forms}
    no_card = "is what a run would try first, and cannot be compiled without the card"
    form, refused = _first(forms, lambda form: wrong[form] or (no_card if form == "cudnn" else None))
    if form is None or (asked == "cudnn" and wrong[asked]):
        raise _none(asked, refused)
    return AttentionChoice(form, refused, tested=False)


def _first(
    forms: Sequence[AttentionForm], reason_against: Callable[[AttentionForm], str | None]
) -> tuple[AttentionForm | None, dict[str, list[str]]]:
    """The first form that nothing speaks against, and those before it by the reason."""
    refused: dict[str, list[str]] = {}
    for form in forms:
        reason = reason_against(form)
        if reason is None:
            return form, refused
        refused.setdefault(reason, []).append(form)
    return None, refused


def _none(asked: AskedAttention, refused: Mapping[str, list[str]]) -> UserError:
    return UserError(
        f"train.attention: {asked} cannot be used here. {_said(refused)}. "
        + ("Please report this" if asked == "auto" else "Set it to auto, which takes the fastest form that can")
    )


def obstacle(form: AttentionForm, needs: AttentionNeeds) -> str | None:
    """Why `form` cannot compute what is needed on these devices; None if nothing speaks against it."""
    if form == "xla":
        return None
    device = needs.layout.mesh.devices.flat[0]
    if device.platform != "gpu":
        return f"needs an NVIDIA GPU, and this is a {device.platform}"
    capability = tuple(int(part) for part in str(device.compute_capability).split("."))
    dtype, width = jnp.dtype(needs.dtype), needs.head_dim
    if capability < (8, 0):
        return f"needs a GPU since Ampere (compute capability 8.0), and this one has {device.compute_capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"computes in bfloat16 or float16, and train.compute_dtype is {dtype}"
    if needs.virtual == "prefix" or (needs.virtual == "prompt" and form == "flash"):
        return f"has no keys in front that all documents see, as the {needs.virtual} of peft needs them"
    if lack := lacks(form, needs.spec):
        return f"{lack}, as the model's attention needs"
    if form == "cudnn" and needs.layout.size("act_inner_length") > 1:
        return "has no queries that begin behind the first key, as mesh.context splits them"
    if form == "flash":
        return f"has no tiles for heads wider than 256, and these are {width}" if width > 256 else None
    if needs.packed:
        return "does not keep documents apart, and data.packing puts several in a row"
    widest = 256 if capability >= (9, 0) else 128
    if width % 8 or width > widest:
        return f"takes heads of a multiple of 8 up to {widest} here, and these are {width} wide"
    return None


def fault(attention: Callable[..., jax.Array], needs: AttentionNeeds) -> str | None:
    """What is wrong with `attention(q, k, v, segments, layout, spec)` on these devices; None if it passes the test.

    Of a short batch in the shape that is needed, one document at a time gets other values. Neither the results nor
    the gradients of any other token may change by a bit, those of other rows included. They must be those of the
    plain form, too, to TEST_TOLERANCE.
    """
    layout, rows = needs.layout, needs.layout.size("batch")
    parts = layout.size("act_inner_length")
    length = -(-TEST_LENGTH // parts) * parts
    rng = np.random.default_rng(0)
    lengths = (97, 131) if needs.packed else (201,)
    documents = np.repeat([*range(1, len(lengths) + 1), 0], [*lengths, length - sum(lengths)])
    segments = np.tile(documents.astype(np.int32), (rows, 1))
    heads = (needs.heads, needs.kv_heads, needs.kv_heads, needs.heads)
    drawn = [rng.standard_normal((2, length, count, needs.head_dim), np.float32) for count in heads]
    # What comes after the last document trains nothing, so that no gradient enters there.
    drawn[3][:, documents == 0] = 0

    def batch(changed: int | None) -> list[jax.Array]:
        """Every row the same, but for one document of the first."""
        arrays = []
        for x in drawn:
            row = np.where((documents == changed)[:, None, None], x[1], x[0])
            arrays.append(np.concatenate([row[None], np.broadcast_to(x[0], (rows - 1, *row.shape))]))
        names = ("act_heads", "act_kv_heads", "act_kv_heads", "act_heads")
        return [
            _place(a.astype(needs.dtype), layout, ("batch", "act_inner_length", name, None))
            for a, name in zip(arrays, names, strict=True)
        ]

    spec = needs.test_spec
    given = _place(segments, layout, ("batch", "act_inner_length")) if needs.packed else None

    # The segments are an argument, since a program cannot hold an array of which other processes have parts.
    @partial(jax.jit, out_shardings=layout.replicated)
    def run(segments: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return _with_gradients(lambda q, k, v: attention(q, k, v, segments, layout, spec))(*arrays)

    try:
        before = _on_host(run(given, *batch(None)))
        for changed in set(documents.tolist()) if needs.packed else {0}:
            others = np.ones((rows, length), bool)
            others[0] = documents != changed
            after = _on_host(run(given, *batch(changed)))
            for name, a, b in zip(("result", "dq", "dk", "dv"), before, after, strict=True):
                if a[others].tobytes() != b[others].tobytes():
                    where = f"document {changed}" if changed else "padding"
                    return f"leaks: {where} changes another document's {name}"
        expected = _on_host(
            jax.jit(partial(_reference, spec=spec), out_shardings=layout.replicated)(*batch(None), segments)
        )
    except (RuntimeError, ValueError) as error:
        return f"fails here: {str(error).strip().splitlines()[0]}"
    real = segments > 0
    for name, a, b in zip(("result", "dq", "dk", "dv"), before, expected, strict=True):
        off = np.abs(a[real].astype(np.float64) - b[real]).max() / np.abs(b[real]).max()
        if not off <= TEST_TOLERANCE:
            return f"is wrong: {name} misses the plain form's by {off:.1%} of its largest value"
    return None


def _reference(
    q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, segments: jax.Array, *, spec: AttentionSpec
) -> tuple[jax.Array, ...]:
    length = q.shape[1]
    mask, distances = causal_mask(segments, 0, length), spec.distances(jnp.arange(length), segments, length)
    wide = at_least_float32(q.dtype)
    with jax.default_matmul_precision("highest"):
        return _with_gradients(lambda q, k, v: attend(q, k, v, mask, spec, distances))(
            *(x.astype(wide) for x in (q, k, v, dy))
        )


def _with_gradients(f: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """`(q, k, v, dy) -> (y, dq, dk, dv)` of `f(q, k, v)`."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(f, q, k, v)
        return y, *pullback(dy)

    return run


def _place(array: np.ndarray, layout: Layout, axes: tuple[str | None, ...]) -> jax.Array:
    return jax.make_array_from_callback(array.shape, layout.sharding(*axes), lambda index: array[index])


def _on_host(arrays: Any) -> list[np.ndarray]:
    return [np.asarray(array) for array in arrays]
