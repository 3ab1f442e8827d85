"""The training step of this project, built as `jaxllm.train.run` builds it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from job import Engine, Job, serve

import jaxllm
from jaxllm.core.hardware import peak_flops
from jaxllm.kernels.attention_choice import choose_attention
from jaxllm.optim.build import AdamW, build
from jaxllm.optim.schedule_config import Constant
from jaxllm.processes.environment import prepare_backends
from jaxllm.step.batch import BATCH_AXES, batch_shapes
from jaxllm.step.build import build_step
from jaxllm.step.compile import compile_step
from jaxllm.step.state import abstract_state, new_state
from jaxllm.train.metrics import flops_per_token


class WithJaxllm(Engine):
    def __init__(self, job: Job) -> None:
        self._job = job

    def open(self) -> dict[str, Any]:
        job, batches = self._job, self._job.batches()
        lm, params = jaxllm.load_hf(job.weights, param_dtype=job.param_dtype, compute_dtype=job.compute_dtype)
        attention = choose_attention("auto", lm.attention_needs(packed=False))
        lm = replace(lm, attention=attention.form)
        config = AdamW(
            type="adamw",
            learning_rate=job.learning_rate,
            b1=job.b1,
            b2=job.b2,
            eps=job.eps,
            weight_decay=job.weight_decay,
            schedule=Constant(type="constant", warmup=0),
        )
        tx, schedule = build(config, 1)
        everything = jax.tree.map(lambda _: True, params)
        shapes = abstract_state(lm.abstract(), everything, tx, lm.layout)
        step = build_step(lm, tx, schedule, max_grad_norm=job.max_grad_norm)
        _, rows, ids = batches.shape
        compiled = compile_step(step, shapes, batch_shapes((1, rows, ids - 1), lm.layout), lm.layout)
        self._run = compiled.run
        new = jax.jit(lambda params: new_state(params, everything, tx), donate_argnums=0)
        self._state = jax.block_until_ready(new(params))
        sharding = lm.layout.sharding(*BATCH_AXES)
        self._batches = [jax.device_put(_arrays(batch[None]), sharding) for batch in batches]
        flops, useful = flops_per_token(lm, ids - 1)
        return {
            "compile_s": compiled.compile_s,
            "planned_bytes": compiled.peak_bytes,
            "attention": attention.form,
            "parameters": lm.parameter_count(),
            "flops_per_token": flops,
            "useful_flops_per_token": useful,
            "known_peak_flops": peak_flops(lm.layout),
            "device": jax.devices()[0].device_kind,
        }

    def step(self, number: int) -> float:
        self._state, metrics = self._run(self._state, self._batches[number % len(self._batches)])
        jax.block_until_ready(self._state)
        return float(metrics["loss"])

    def matmul(self, size: int) -> Callable[[], None]:
        x = jnp.ones((size, size), self._job.compute_dtype)
        multiply = jax.jit(lambda x: x @ x)
        return lambda: jax.block_until_ready(multiply(x))

    def peak_bytes(self) -> int:
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or super().peak_bytes()


def _arrays(ids: np.ndarray) -> dict[str, np.ndarray]:
    """One document a row, every token trained."""
    tokens = ids[..., :-1]
    return {
        "tokens": tokens,
        "targets": ids[..., 1:],
        "positions": np.broadcast_to(np.arange(tokens.shape[-1], dtype=np.int32), tokens.shape),
        "segments": np.ones_like(tokens),
        "loss_mask": np.ones(tokens.shape, np.float32),
    }


if __name__ == "__main__":
    prepare_backends()
    serve(WithJaxllm)
