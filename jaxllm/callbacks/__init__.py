"""Importing this registers every callback that a config can choose."""

from jaxllm.callbacks import tensorboard as tensorboard
