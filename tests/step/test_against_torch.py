"""Ten steps of AdamW, as a user of torch and transformers would write them."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

from jaxllm.hf import save_hf
from jaxllm.objectives.base import CROSS_ENTROPY, CrossEntropy
from jaxllm.optim.build import build
from jaxllm.optim.schedule_config import Linear
from tests.support.families import draw_params, small_lm
from tests.support.small_runs import MAX_GRAD_NORM, OPTIMIZER, llama, program, ragged_batch

STEPS, WARMUP, FINAL = 10, 3, 0.1
CONFIG = llama(num_key_value_heads=2, attention_bias=True)
OPTIM = OPTIMIZER.model_copy(
    update={"schedule": OPTIMIZER.schedule.model_copy(update={"warmup": WARMUP, "final": FINAL})}
)
# A second recipe: a straight line down, and an objective that is more than the cross entropy.
LINEAR = OPTIM.model_copy(update={"schedule": Linear(type="linear", warmup=WARMUP, final=FINAL)})
SMOOTHED = CrossEntropy(label_smoothing=0.1, z_loss=1e-2)


def padded_batch(seed: int) -> dict[str, np.ndarray]:
    """One document a row, of every length, padded at its end; some of its tokens are trained."""
    batch = ragged_batch(seed)
    rng = np.random.default_rng(seed)
    rows, length = batch["tokens"].shape
    real = np.arange(length) < rng.integers(1, length + 1, (rows, 1))
    trained = real & (rng.random(real.shape) < 0.7)
    trained[:, 0] = True
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return batch | {
        "segments": real.astype(np.int32),
        "positions": positions,
        "loss_mask": trained.astype(np.float32),
    }


BATCHES = [padded_batch(seed) for seed in range(3)]


def rate(step: int, falls: Callable[[float], float]) -> float:
    """A warm-up that starts above zero, then down to a tenth of the peak, reached after the last step."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    progress = (step - (WARMUP - 1)) / (STEPS - (WARMUP - 1))
    return FINAL + (1 - FINAL) * falls(progress)


def along_cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def along_line(progress: float) -> float:
    return 1 - progress


GROUPS = {"embed": "embed_tokens", "attn": "self_attn", "mlp": "mlp", "norms": "norm", "head": "lm_head"}


def norm_of(tensors: list[torch.Tensor]) -> float:
    return torch.cat([tensor.flatten() for tensor in tensors]).norm().item()


def torch_run(
    model: LlamaForCausalLM, falls: Callable[[float], float], smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Metrics and trained weights of ten steps of two micro-batches.

    The norms are those of gradients before clipping and of weights before the update: all together, and by group.
    """
    named = dict(model.named_parameters())
    plain = [p for name, p in named.items() if name.endswith("bias") or "norm" in name]
    decayed = [p for name, p in named.items() if not (name.endswith("bias") or "norm" in name)]
    optimized = [
        {"params": decayed, "weight_decay": OPTIM.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(optimized, lr=OPTIM.learning_rate, betas=(OPTIM.b1, OPTIM.b2), eps=OPTIM.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, falls))
    metrics = defaultdict(list)
    parts = {name: name.removesuffix(".weight").removesuffix(".bias").split(".") for name in named}
    groups = {
        group: [p for name, p in named.items() if any(part.endswith(theirs) for part in parts[name])]
        for group, theirs in GROUPS.items()
    }
    for step in range(STEPS):
        batch = {name: torch.tensor(array) for name, array in BATCHES[step % 3].items()}
        targets = torch.where(batch["loss_mask"] > 0, batch["targets"].long(), -100)
        trained, losses = (targets != -100).sum(), np.zeros(3)
        for half in torch.arange(len(targets)).chunk(2):
            logits = model(batch["tokens"][half].long(), attention_mask=batch["segments"][half]).logits
            logits, half_targets = logits.flatten(0, 1), targets[half].flatten()
            part = partial(torch.nn.functional.cross_entropy, logits, half_targets, ignore_index=-100, reduction="sum")
            log_z = torch.logsumexp(logits, -1)[half_targets >= 0]
            parts_of_loss = part(label_smoothing=smoothing), part(), z_loss * (log_z**2).sum()
            objective = (parts_of_loss[0] + parts_of_loss[2]) / trained
            objective.backward()
            losses += [objective.item(), (parts_of_loss[1] / trained).item(), (parts_of_loss[2] / trained).item()]
        for name, value in zip(("objective", "loss", "z_loss"), losses, strict=True):
            metrics[name].append(value)
        metrics["learning_rate"].append(schedule.get_last_lr()[0])
        for group, members in groups.items():
            metrics[f"grad_norm/{group}"].append(norm_of([p.grad for p in members]))
            metrics[f"param_norm/{group}"].append(norm_of([p.detach() for p in members]))
        metrics["grad_norm"].append(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM).item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return metrics, {name: weight.detach().numpy() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize(
    ("optim", "falls", "objective"),
    [(OPTIM, along_cosine, CROSS_ENTROPY), (LINEAR, along_line, SMOOTHED)],
    ids=["cosine", "linear, smoothed, z-loss"],
)
def test_ten_steps_are_those_of_torch(tmp_path, optim, falls, objective):
    lm = small_lm(CONFIG)
    save_hf(lm, draw_params(lm), tmp_path / "model")
    torch.set_num_threads(1)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager", dtype="float32")
    theirs, weights = torch_run(model, falls, objective.label_smoothing, objective.z_loss)
    assert theirs["loss"][-1] < 0.9 * theirs["loss"][0]
    assert min(theirs["grad_norm"]) < MAX_GRAD_NORM < max(theirs["grad_norm"])

    tx, schedule = build(optim, STEPS)
    made = program(CONFIG, tx=tx, schedule=schedule, micro_batches=2, objective=objective)
    state, metrics = made.start(), []
    for step in range(STEPS):
        state, values = made.compiled.run(state, made.place(BATCHES[step % 3], 2))
        metrics.append({name: float(value) for name, value in values.items()})
    # Float32: rounding comes to about 2e-6 of the losses, 6e-6 of the norms and 3e-6 of the largest weights. Decay of
    # norms and biases misses the losses by 7e-4, a rate one step off by 6e-2, b2 = 0.998 by 4e-5.
    ours = {name: [values[name] for values in metrics] for name in metrics[0]}
    if objective == CROSS_ENTROPY:
        assert not {"objective", "z_loss"} & ours.keys()
        assert theirs.pop("objective") == theirs["loss"]
        assert not any(theirs.pop("z_loss"))
    for name, values in theirs.items():
        tolerance = 1e-5 if name in ("loss", "objective") else 1e-6 if name == "learning_rate" else 3e-5
        np.testing.assert_allclose(ours[name], values, rtol=tolerance, err_msg=name)
    save_hf(lm, state.params, tmp_path / "trained")
    trained = load_file(tmp_path / "trained" / "model.safetensors")
    assert trained.keys() == weights.keys()
    misses = {name: np.abs(trained[name] - w).max() / np.abs(w).max() for name, w in weights.items()}
    assert {name: miss for name, miss in misses.items() if miss > 2e-5} == {}
