"""The model of a run: opened, and adapted to how the run trains it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from jaxllm.core.console import Say
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.data.text.tokenizer import load_tokenizer
from jaxllm.files import hub
from jaxllm.hf import load_params
from jaxllm.hf.config import parse_config, read_config
from jaxllm.models import FAMILIES, LM
from jaxllm.models.family import FamilyConfig
from jaxllm.models.fit_layout import check_chunks, fitted
from jaxllm.peft.adapter import with_adapter
from jaxllm.peft.base import describe
from jaxllm.runs.config import Config
from jaxllm.runs.model_config import ModelConfig
from jaxllm.runs.open import OpenModel, fitting_tokenizer, model_folder, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def open_chosen_model(config: Config, layout: Layout) -> OpenModel:
    """The model of the config, new or from a folder, beside its tokenizer, `adapted`.

    Its `load()` gives the parameters without those that the method of fine-tuning draws.
    """
    chosen = config.model
    if chosen.path is None:
        lm = _described(config, layout)
        return OpenModel(adapted(config, lm), _tokenizer_folder(chosen), lambda: lm.init(jax.random.key(config.seed)))
    model = open_model(chosen.path, layout, config.train.param_dtype, config.train.compute_dtype)
    model.check_whole()
    if chosen.quantization is not None:
        if model.lm.source is None:
            raise UserError(
                f"model.quantize reads a Hugging Face folder layer by layer, and model.path {chosen.path} is a run or "
                "one of its checkpoints; give the run's export/hf, or what python -m jaxllm.convert to-hf makes of it"
            )
        quantized = replace(model.lm, quantization=chosen.quantization)
        quantized.abstract()  # of a shape that it cannot store
        model = replace(model, load=lambda: load_params(quantized))
    for i, adapter in enumerate(chosen.adapters, 1):
        model.check_lacks(adapter)
        trains_on = config.peft if i == len(chosen.adapters) else None
        model = replace(model, load=with_adapter(adapter, model.lm, model.load, trains_on))
    if chosen.tokenizer is not None:
        model = replace(model, folder=hub.model_folder(chosen.tokenizer, "tokenizer"))

    def tokenize(text: str) -> list[int]:
        return list(model.tokenizer()(text)["input_ids"])

    load = config.peft.begun(model.lm, model.load, tokenize)
    return replace(model, lm=adapted(config, model.lm), load=load)


def open_tokenizer(chosen: ModelConfig) -> PreTrainedTokenizerFast:
    """The tokenizer of the model, which needs no weights and no devices for it."""
    return fitting_tokenizer(_tokenizer_folder(chosen), _family_config(chosen).vocab_size)


def model_without_weights(config: Config, layout: Layout) -> LM:
    """The model of the config, `adapted`, as its config.json or its section describes it; no weights need be there."""
    return adapted(config, _described(config, layout))


def adapted(config: Config, lm: LM) -> LM:
    """`lm` as the run trains it: with the leaves that its method adds, and how its layers are stored and ordered.

    Raises UserError where the method, or train.virtual_stages, does not fit the model.
    """
    lm = config.peft.add(replace(lm, dropout=config.train.dropout))
    lm = replace(lm, quantization=config.quantization, virtual_stages=config.train.virtual_stages)
    check_chunks(lm)
    return lm


def kind_and_size(lm: LM) -> str:
    """What the model is, without what an adapter adds to it."""
    return f"{lm.config.type} with {replace(lm, extra={}).parameter_count():,} parameters"


def say_model(model: OpenModel, config: Config, layout: Layout, say: Say) -> None:
    """Says what the model is, how much of it trains, and what of `layout` and data.seq_len does not fit it."""
    lm = model.lm
    say("model", f"{kind_and_size(lm)}, computing in {lm.compute_dtype}")
    if (name := hub.shown(model.folder)) != str(model.folder):
        say("", f"from {name}")
    if lm.quantization is not None:
        say("", f"the matrices of its layers are stored in {lm.quantization}")
    if config.peft.type != "full":
        say("peft", describe(config.peft, lm))
    if lm.layout.rules != layout.rules:
        say("", f"the {lm.config.num_key_value_heads} key-value heads are held by every device of the tensor axis")
    if config.data.seq_len > (most := lm.config.longest):
        say("note", f"data.seq_len is longer than the {most} tokens the model is meant for")


def _described(config: Config, layout: Layout) -> LM:
    of_family, train = _family_config(config.model), config.train
    return fitted(FAMILIES[of_family.type], of_family, layout, train.param_dtype, train.compute_dtype)


def _family_config(chosen: ModelConfig) -> FamilyConfig:
    """The config of the model. That of a new one needs its tokenizer where it does not say how large it is."""
    if chosen.path is not None:
        folder = model_folder(chosen.path, "config")
        return parse_config(read_config(folder), folder / "config.json")[1]
    return chosen.family_config(lambda: 1 + max(load_tokenizer(_tokenizer_folder(chosen)).get_vocab().values()))


def _tokenizer_folder(chosen: ModelConfig) -> Path:
    if chosen.tokenizer is not None:
        return hub.model_folder(chosen.tokenizer, "tokenizer")
    assert chosen.path is not None  # the section of a new model has a tokenizer
    return model_folder(chosen.path, "tokenizer")
