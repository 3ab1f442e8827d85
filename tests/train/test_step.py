"""The training step: what it does to a small Llama, and its arithmetic on losses of one line."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import torch
from families import mesh_layout
from small_runs import MAX_GRAD_NORM, OPTIMIZER, STEPS, assert_trained_alike, llama, program, ragged_batch, train

from jaxllm import optim
from jaxllm.core import tree
from jaxllm.models.stack import loop, scan
from jaxllm.train.state import TrainState, new_state
from jaxllm.train.step import make_step

# A transform whose state after one step is the gradient that it was given.
RECORD = optax.trace(0.9)


# One AdamW step of a Llama with biases on a mesh of eight, part of it frozen: compiled once, as in a run.

FROZEN = ("embed/*", "*/q/kernel")


@cache
def partly_frozen():
    config = llama(attention_bias=True, mlp_bias=True)
    trainable = tree.match(jax.eval_shape(lambda: program_params(config)), "*", exclude=FROZEN)
    return program(config, mesh_layout(data=2, fsdp=2, tensor=2), trainable=trainable)


def program_params(config):
    from families import draw_params, small_lm

    return draw_params(small_lm(config))
