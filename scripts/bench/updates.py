#!/usr/bin/env python3
"""Runs the training step of a model on this device with one optimizer and one form of update: seconds and peak bytes.

    python scripts/bench/updates.py 1B adamw fused        AdamW inside the backward pass, in bfloat16, 1 × 2048 tokens
    python scripts/bench/updates.py 8B lomo ordinary --results lomo.json

One process measures one step, since a device remembers its peak. Weights are drawn, tokens too.
"""

import argparse
import json
import time
from pathlib import Path

from job import SIZES

from jaxllm.processes.environment import prepare_backends


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("optimizer")
    parser.add_argument("update", choices=("ordinary", "fused"))
    parser.add_argument("--tokens", type=int, default=2048, help="of the one sequence")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--max-grad-norm", type=float)
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    asked = parser.parse_args()
    prepare_backends()
    import jax
    import jax.numpy as jnp
    from summary import spread

    from jaxllm.core.mesh import Layout
    from jaxllm.core.versions import environment
    from jaxllm.models import FAMILIES, LM
    from jaxllm.optim.build import OPTIMIZERS, build
    from jaxllm.step.batch import batch_shapes
    from jaxllm.step.build import build_step
    from jaxllm.step.compile import compile_step
    from jaxllm.step.state import abstract_state, new_state

    family, size = FAMILIES["llama"], SIZES[asked.size]
    bf16 = jnp.bfloat16
    form = "cudnn" if jax.default_backend() == "gpu" else "xla"
    config = family.config(**{**size.fields(), "max_position_embeddings": asked.tokens})
    lm = LM(family, config, Layout.single(), bf16, bf16, form)
    section = {"type": asked.optimizer, "learning_rate": 1e-4, "schedule": {"type": "constant", "warmup": 0}}
    tx, schedule = build(OPTIMIZERS[asked.optimizer].model_validate(section), asked.steps)
    everything = jax.tree.map(lambda _: True, lm.abstract())
    how = {"update": asked.update, "remat": "full", "unroll": 1, "max_grad_norm": asked.max_grad_norm}
    step = build_step(lm, tx, schedule, **how)
    state = abstract_state(lm.abstract(), everything, tx, lm.layout)
    compiled = compile_step(step, state, batch_shapes((1, 1, asked.tokens), lm.layout), lm.layout)
    current = jax.jit(lambda params: new_state(params, everything, tx), donate_argnums=0)(lm.init(jax.random.key(0)))
    tokens = jax.random.randint(jax.random.key(1), (1, 1, asked.tokens), 0, size.vocab_size, jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, -1),
        "positions": jnp.arange(asked.tokens, dtype=jnp.int32)[None, None],
        "segments": jnp.ones_like(tokens),
        "loss_mask": jnp.ones(tokens.shape, jnp.float32),
    }
    batch = jax.device_put(batch, jax.devices()[0])
    seconds, losses = [], []
    for _ in range(asked.steps):
        start = time.monotonic()
        current, metrics = compiled.run(current, batch)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(current)
        seconds.append(time.monotonic() - start)
    stats = jax.devices()[0].memory_stats() or {}
    result = {
        "size": asked.size,
        "optimizer": asked.optimizer,
        "update": asked.update,
        "max_grad_norm": asked.max_grad_norm,
        "tokens": asked.tokens,
        "attention": form,
        "planned_bytes": compiled.peak_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "compile_s": compiled.compile_s,
        "step_s": spread(seconds[2:]),
        "losses": losses,
        **{name: value for name, value in environment().items() if name != "command"},
    }
    if asked.results:
        asked.results.write_text(json.dumps(result, indent=1) + "\n")
    peak = (result["peak_bytes"] or 0) / 2**20
    print(
        f"{asked.size} {asked.optimizer} {asked.update}: {result['step_s']['median']:.4f} s, peak {peak:,.0f} MiB, "
        f"planned {compiled.peak_bytes / 2**20:,.0f} MiB, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
