"""The same step as a user of PyTorch and transformers writes it: SDPA attention, fused AdamW."""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from job import Engine, Job, serve
from transformers import LlamaForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class WithTorch(Engine):
    compiled = False

    def __init__(self, job: Job) -> None:
        self._job = job
        self._compute = getattr(torch, job.compute_dtype)

    def open(self) -> dict[str, Any]:
        job = self._job
        model: Any = LlamaForCausalLM.from_pretrained(job.weights, attn_implementation="sdpa", dtype=job.param_dtype)
        model.config.use_cache = False
        self._model = model.to(DEVICE).train()
        self._parameters = list(self._model.parameters())
        named = list(self._model.named_parameters())
        groups = [
            {"params": [p for name, p in named if "norm" not in name], "weight_decay": job.weight_decay},
            {"params": [p for name, p in named if "norm" in name], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=job.learning_rate, betas=(job.b1, job.b2), eps=job.eps, fused=True
        )
        self._batches = torch.from_numpy(job.batches()).long().to(DEVICE)
        self._forward: Any = torch.compile(self._loss) if self.compiled else self._loss
        return {"compile_s": self._compile() if self.compiled else 0.0, "attention": "sdpa"}

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._model(ids[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def _autocast(self) -> Any:
        mixed = self._job.param_dtype != self._job.compute_dtype
        return torch.autocast(DEVICE, self._compute) if mixed else contextlib.nullcontext()

    def _compile(self) -> float:
        """Seconds of a first forward and backward pass, whose gradient is thrown away."""
        start = time.monotonic()
        with self._autocast():
            loss = self._forward(self._batches[0])
        loss.backward()
        self._optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - start

    def step(self, number: int) -> float:
        with self._autocast():
            loss = self._forward(self._batches[number % len(self._batches)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._job.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def matmul(self, size: int) -> Callable[[], None]:
        x = torch.ones((size, size), dtype=self._compute, device=DEVICE)

        def multiply() -> None:
            torch.matmul(x, x)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        return multiply

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else super().peak_bytes()


class WithTorchCompile(WithTorch):
    compiled = True


if __name__ == "__main__":
    serve(WithTorchCompile if sys.argv[2:] == ["compile"] else WithTorch)
