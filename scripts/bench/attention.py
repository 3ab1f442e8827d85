#!/usr/bin/env python3
"""Times the forms of attention, forward and backward: a minute on a GPU.

    python scripts/bench/attention.py                                     2048, 4096 and 8192 tokens, packed and not
    python scripts/bench/attention.py --lengths 256 --tokens 512          a smoke test for a CPU

Each form that can compute the shape here takes its turn in every round, so that whatever else the machine does meets
all of them, and is first tested for leaks, as in a run. Each call works on the same number of tokens, in rows of each
length. Packed rows hold documents of 512 tokens on average, of seeded lengths; the others one each. Results are JSON
files in scripts/bench/results.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.mesh import Layout
from jaxllm.core.versions import environment
from jaxllm.kernels.attention import AttentionForm, causal_attention
from jaxllm.kernels.attention_choice import BY_SPEED, AttentionNeeds, fault, obstacle
from jaxllm.kernels.attention_spec import AttentionSpec
from jaxllm.processes.environment import prepare_backends

RESULTS = Path(__file__).parent / "results" / "attention"
DOCUMENT = 512  # tokens of a packed document, on average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192], help="tokens in a row")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in a batch, of every length")
    parser.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("HEADS", "KV_HEADS", "HEAD_DIM"))
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--window", type=int, help="keys that a query sees, as a model with a sliding window has it")
    parser.add_argument("--soft-cap", type=float, help="cap of scores, as Gemma 2 has it")
    parser.add_argument("--rounds", type=int, default=10, help="timed calls of each program")
    asked = parser.parse_args()
    dtype = asked.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")
    rows: list[dict[str, Any]] = []
    for packed in (False, True):
        heads, kv_heads, head_dim = asked.heads
        spec = AttentionSpec(window=asked.window, soft_cap=asked.soft_cap)
        needs = AttentionNeeds(Layout.single(), heads, kv_heads, head_dim, jnp.dtype(dtype), packed, spec=spec)
        forms = able(needs)
        for length in asked.lengths:
            rows += measure(needs, forms, length, max(1, asked.tokens // length), asked.rounds)
    now = datetime.now(UTC)
    report = {**environment(), "time": now.isoformat(timespec="seconds"), "dtype": dtype, "attention": rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {path}")


def able(needs: AttentionNeeds) -> list[AttentionForm]:
    """The forms that can compute it here; says what speaks against the others."""
    forms: list[AttentionForm] = []
    for form in BY_SPEED:
        reason = obstacle(form, needs) or fault(partial(causal_attention, form), needs)
        if reason is None:
            forms.append(form)
        else:
            print(f"{'packed' if needs.packed else 'one document a row'}: {form} left out, {reason}")
    return forms


def measure(
    needs: AttentionNeeds, forms: Sequence[AttentionForm], length: int, batch: int, rounds: int
) -> list[dict[str, Any]]:
    """One row a form and direction: milliseconds, and TFLOP/s of the products that order and window leave."""
    programs: dict[tuple[str, str], Callable[[], Any]] = {}
    temporary: dict[tuple[str, str], float] = {}
    rng = np.random.default_rng(0)
    heads = (needs.heads, needs.kv_heads, needs.kv_heads, needs.heads)
    q, k, v, dy = (
        jnp.asarray(rng.standard_normal((batch, length, count, needs.head_dim), np.float32), needs.dtype)
        for count in heads
    )
    segments = jnp.asarray(documents(rng, batch, length)) if needs.packed else None
    what = f"{batch} × {length}, {'packed' if needs.packed else 'one document a row'}"
    for form in forms:
        attention = partial(causal_attention, form)

        def forward(q: jax.Array, k: jax.Array, v: jax.Array, attention: Callable[..., jax.Array] = attention) -> Any:
            return attention(q, k, v, segments, needs.layout, needs.spec.within(length))

        def both(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array, f: Callable[..., Any] = forward) -> Any:
            return jax.vjp(f, q, k, v)[1](dy)

        for direction, f, arrays in (("forward", forward, (q, k, v)), ("forward and backward", both, (q, k, v, dy))):
            try:
                compiled = jax.jit(f).lower(*arrays).compile()
                program = partial(compiled, *arrays)
                jax.block_until_ready(program())
            except jax.errors.JaxRuntimeError as error:
                print(f"{what}: {form}, {direction} left out, {str(error).splitlines()[0]}")
                continue
            memory: Any = compiled.memory_analysis()
            programs[form, direction] = program
            temporary[form, direction] = memory.temp_size_in_bytes / 2**20
    times = in_turns(programs, rounds)
    rows = []
    for (form, direction), seconds in times.items():
        # Two products of 2·d operations for each pair of tokens forward, and five backward; half the pairs.
        products = 2 if direction == "forward" else 7
        window = min(length, needs.spec.window or length)
        flops = products * batch * needs.heads * window * (2 * length - window) * needs.head_dim
        median = float(np.median(seconds))
        row = dict(form=form, direction=direction, packed=needs.packed, batch=batch, length=length)
        shape = dict(heads=needs.heads, kv_heads=needs.kv_heads, head_dim=needs.head_dim)
        shape |= dict(window=needs.spec.window, soft_cap=needs.spec.soft_cap)
        timing = dict(median_ms=median * 1e3, fastest_ms=min(seconds) * 1e3, slowest_ms=max(seconds) * 1e3)
        rows.append({**row, **shape, **timing, "temp_mib": temporary[form, direction]})
        # What documents leave out of it depends on their lengths, so that only whole rows have a rate.
        rate = "" if needs.packed else f", {flops / median / 1e12:.1f} TFLOP/s"
        print(f"{what}: {form}, {direction} {median * 1e3:.2f} ms{rate}, {temporary[form, direction]:.0f} MiB")
    return rows


def documents(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Rows of documents whose borders are drawn evenly, one for every DOCUMENT tokens; no padding."""
    borders = rng.random((batch, length)) < 1 / DOCUMENT
    return 1 + np.cumsum(borders, axis=1, dtype=np.int32)


def in_turns(programs: dict[tuple[str, str], Callable[[], Any]], rounds: int) -> dict[tuple[str, str], Sequence[float]]:
    """The seconds of each call of each program."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - start)
    return dict(seconds)


if __name__ == "__main__":
    prepare_backends()
    main()
