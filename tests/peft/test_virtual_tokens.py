"""Prompt tuning, p-tuning and prefix tuning against HF peft; packed, decoded, and in whole runs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from jaxllm.convert.__main__ import main as convert
from jaxllm.core import tree
from jaxllm.core.errors import UserError
from jaxllm.core.mesh import Layout
from jaxllm.core.tree import Params
from jaxllm.generate.__main__ import main as generate
from jaxllm.generate.decode import Decoder
from jaxllm.models import LM
from jaxllm.peft import METHODS
from jaxllm.peft.adapter import read_adapter, with_adapter
from jaxllm.peft.base import PeftConfig
from jaxllm.peft.lora import Lora
from jaxllm.peft.prompt import PromptTuning
from jaxllm.runs.open import open_model
from tests.support.adapters import TOKENS, TOLERANCE, dear, logits, model, torch_logits
from tests.support.families import transformers_model
from tests.support.whole_runs import train, workplace

N = 5
METHODS_HERE: dict[str, dict[str, Any]] = {
    "prompt_tuning": dict(),
    "p_tuning": dict(encoder_hidden_size=24),
    "p_tuning with LSTM": dict(encoder_reparameterization_type="LSTM", encoder_hidden_size=24),
    "prefix_tuning": dict(),
    "prefix_tuning with projection": dict(prefix_projection=True, encoder_hidden_size=24),
}


def method_of(name: str) -> PeftConfig:
    kind = name.partition(" ")[0]
    return METHODS[kind].model_validate({"type": kind, "num_virtual_tokens": N, **METHODS_HERE[name]})


def started(lm: LM, base: Params, method: PeftConfig) -> tuple[LM, Params]:
    adapted = method.add(lm)
    return adapted, jax.jit(adapted.with_extra)(base, jax.random.key(0))


@pytest.mark.parametrize("name", dear(METHODS_HERE, "prompt_tuning", "prefix_tuning"))
def test_its_files_load_in_hf_peft_and_come_back(name, tmp_path):
    """The logits behind the virtual tokens are peft's; decoding with a cache, and several documents in a row, are as
    each document alone."""
    lm, base = model(num_attention_heads=8, num_key_value_heads=2)
    method = method_of(name)
    adapted, params = started(lm, base, method)
    ours = logits(adapted, params)
    assert ours.shape == (*TOKENS.shape, lm.config.vocab_size)
    assert np.abs(ours - logits(lm, base)).max() > 0.1
    method.export(adapted, params, tmp_path / "adapter", model_folder=tmp_path, base="base")
    module = transformers_model(lm.config, base, tmp_path / "base")
    theirs = torch_logits(peft.PeftModel.from_pretrained(module, tmp_path / "adapter"))
    np.testing.assert_allclose(ours, theirs[:, -TOKENS.shape[1] :], atol=TOLERANCE)

    again = read_adapter(tmp_path / "adapter").method
    back = with_adapter(tmp_path / "adapter", lm, lambda: base, again)()
    np.testing.assert_allclose(logits(again.add(lm), back), ours, atol=TOLERANCE)

    lengths, (first, second) = (7, 9), TOKENS
    packed = np.concatenate([first[: lengths[0]], second[: lengths[1]]])[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    segments = np.repeat([1, 2], lengths)[None]
    run = jax.jit(lambda params: adapted.logits(params, packed, positions=positions, segments=segments))
    alone = np.concatenate([ours[0, : lengths[0]], ours[1, : lengths[1]]])
    np.testing.assert_allclose(run(params)[0], alone, atol=TOLERANCE)

    prompts = [list(map(int, first[:4])), list(map(int, second[:9]))]
    for prompt, new in zip(prompts, Decoder(adapted)(params, prompts, max_new_tokens=6), strict=True):
        text = np.array([prompt + new])
        # by the model without a cache; padding behind makes one shape of all lengths
        padded = jnp.pad(text, ((0, 0), (0, 16 - text.shape[1])))
        greedy = np.argmax(jax.jit(adapted.logits)(params, padded)[0], axis=-1)
        assert new == greedy[len(prompt) - 1 : text.shape[1] - 1].tolist()


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_virtual_tokens_are_in_a_sliding_window_too(kind, tmp_path):
    """The last tokens of a row do not see all of them, as in peft."""
    lm, base = model("phi3", sliding_window=TOKENS.shape[1] - 3)
    adapted, params = started(lm, base, method_of(kind))
    method_of(kind).export(adapted, params, tmp_path / "adapter", model_folder=tmp_path, base="base")
    module = transformers_model(lm.config, base, tmp_path / "base")
    theirs = torch_logits(peft.PeftModel.from_pretrained(module, tmp_path / "adapter"))
    np.testing.assert_allclose(logits(adapted, params), theirs[:, -TOKENS.shape[1] :], atol=TOLERANCE)


@pytest.mark.parametrize(
    "settings",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=16),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=16
        ),
    ],
    ids=lambda settings: f"{settings.peft_type.value} {getattr(settings, 'prefix_projection', '')}",
)
def test_files_of_hf_peft_load(settings, tmp_path):
    lm, base = model(num_attention_heads=8, num_key_value_heads=2, hidden_size=64, head_dim=8)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(transformers_model(lm.config, base, tmp_path / "base"), settings)
    theirs.save_pretrained(tmp_path / "adapter")
    wanted = torch_logits(theirs.eval())[:, -TOKENS.shape[1] :]
    method = read_adapter(tmp_path / "adapter").method
    params = with_adapter(tmp_path / "adapter", lm, lambda: base, method)()
    np.testing.assert_allclose(logits(method.add(lm), params), wanted, atol=TOLERANCE)


def test_an_lstm_is_torchs():
    from jaxllm.nn.prompt import virtual_tokens

    torch.manual_seed(0)
    lstm = torch.nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)
    x = torch.randn(1, 5, 6)
    encoder: dict[str, Any] = {"linear_0": {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8, np.float32)}}
    for layer in range(2):
        for direction, end in (("forward", ""), ("backward", "_reverse")):
            w = {k: getattr(lstm, f"{k}_l{layer}{end}").detach().numpy() for k in ("weight_ih", "weight_hh")}
            bias = sum(getattr(lstm, f"bias_{k}_l{layer}{end}").detach().numpy() for k in ("ih", "hh"))
            encoder.setdefault(f"lstm_{layer}", {})[direction] = {
                "input": {"kernel": w["weight_ih"].T},
                "recurrent": {"kernel": w["weight_hh"].T},
                "bias": bias,
            }
    ours = virtual_tokens(jnp.asarray(x[0].numpy()), encoder)
    np.testing.assert_allclose(ours, lstm(x)[0][0].detach().numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (dict(type="prompt_tuning", num_virtual_tokens=64), "the model has 64 positions for them and the text"),
        (dict(type="prompt_tuning", prompt_tuning_init="TEXT"), "give TEXT and a text, or neither"),
        (dict(type="prefix_tuning", encoder_hidden_size=8), "prefix_projection is false"),
    ],
)
def test_what_cannot_be_added_is_refused(section, message):
    lm, _ = model()
    with pytest.raises((UserError, ValueError), match=message):
        METHODS[section["type"]].model_validate(section).add(lm)


def test_an_adapter_of_another_kind_is_refused(tmp_path):
    lm, base = model()
    method = PromptTuning(type="prompt_tuning", num_virtual_tokens=N)
    adapted, params = started(lm, base, method)
    method.export(adapted, params, tmp_path, model_folder=tmp_path, base=None)
    for other in (PromptTuning(type="prompt_tuning", num_virtual_tokens=4), Lora(type="lora")):
        with pytest.raises(UserError, match=r"is another adapter .* it is .*num_virtual_tokens: 5"):
            with_adapter(tmp_path, lm, lambda: base, other)
    with pytest.raises(UserError, match="cannot be merged into the weights"):
        with_adapter(tmp_path, lm, lambda: base)


def test_runs(tmp_path_factory, shared, capsys):
    """From a text; on from the adapter; what cannot be merged is refused; the run is generated from."""
    folder = tmp_path_factory.mktemp("virtual")
    with workplace(folder, shared) as config:
        base = shared / "models/stories260K"
        section = [f"model={{path: {base}}}", "peft.num_virtual_tokens=6"]
        text = ["peft.type=prompt_tuning", "peft.prompt_tuning_init=TEXT", "peft.prompt_tuning_init_text=Once upon a"]
        ran = train(config, f"output_dir={folder / 'text'}", *section, *text, "optim.weight_decay=0")
        losses = [line["eval/held_out/loss"] for line in ran.metrics() if "eval/held_out/loss" in line]
        assert losses[-1] < losses[0] - 0.005
        on = ["peft.type=prompt_tuning", f"model.adapter={folder / 'text'}", "train.steps=2", "evals.0.every=1"]
        ran = train(config, f"output_dir={folder / 'on'}", *section, *on, "checkpoint.every=1")
        first = next(line["eval/held_out/loss"] for line in ran.metrics() if "eval/held_out/loss" in line)
        np.testing.assert_allclose(first, losses[-1], rtol=1e-5)
        opened = open_model(folder / "text", Layout.single())
        assert tree.at(opened.load(), "embed/prompt").shape[0] == 6
        capsys.readouterr()
        assert generate([str(folder / "text"), "--prompt", "Once", "--max-new-tokens", "4"]) == 0
        assert convert(["to-hf", str(folder / "text"), str(folder / "hf")]) == 2
        assert "has trained virtual tokens, which cannot be merged" in capsys.readouterr().err
        with pytest.raises(UserError, match="has trained virtual tokens"):
            train(config, f"output_dir={folder / 'x'}", f"model={{path: {folder / 'text'}}}")
