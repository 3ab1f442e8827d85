"""config.json in the forms of transformers 4 and 5, in and out."""

import dataclasses
import json
import math

import pytest

from jaxllm.core.errors import UserError
from jaxllm.hf.config import parse_config, read_config, write_config
from jaxllm.hf.fields import INERT
from jaxllm.hf.rope import FIELDS as ROPE_FIELDS
from jaxllm.models import FAMILIES
from tests.support.families import draw_config

# What Llama 2 7B came with, and the same model as transformers 5 writes it.
V4 = {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": 32000,
}
V5 = {
    **{key: value for key, value in V4.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "float16",
    "head_dim": 128,
    "mlp_bias": False,
    "pad_token_id": None,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "transformers_version": "5.23.0",
}


def test_the_forms_of_transformers_4_and_5_mean_the_same():
    family, config = parse_config(V4)
    assert family is FAMILIES["llama"]
    assert parse_config(V5) == (family, config)
    assert (config.rope_theta, config.head_dim, config.max_position_embeddings) == (500000.0, 128, 4096)


@pytest.mark.parametrize("raw", [V4, V5], ids=["transformers 4", "transformers 5"])
def test_an_unchanged_config_comes_back_equal(raw):
    family, config = parse_config(raw)
    assert write_config(family, config, source=raw) == raw


@pytest.mark.parametrize("raw", [V4, V5], ids=["transformers 4", "transformers 5"])
def test_only_what_changed_is_updated_and_in_the_form_of_the_file(raw):
    family, config = parse_config(raw)
    config = config.model_copy(update={"rope_theta": 7.0, "vocab_size": 40, "attention_bias": True})
    out = write_config(family, config, source=raw, dtype="bfloat16", special_ids={"eos_token_id": [2, 7]})
    changed = {"vocab_size": 40, "attention_bias": True, "eos_token_id": [2, 7]}
    if raw is V4:
        assert out == {**V4, **changed, "rope_theta": 7.0, "torch_dtype": "bfloat16"}
    else:
        rope = {"rope_theta": 7.0, "rope_type": "default"}
        assert out == {**V5, **changed, "rope_parameters": rope, "dtype": "bfloat16"}
    assert parse_config(out) == (family, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_what_we_write_and_we_what_it_writes(name, tmp_path):
    from transformers import AutoConfig

    family = FAMILIES[name]
    for seed in range(8):
        config = draw_config(name, seed)
        raw = write_config(family, config, dtype="bfloat16", special_ids={"eos_token_id": 5})
        (tmp_path / "config.json").write_text(json.dumps(raw))
        theirs = AutoConfig.from_pretrained(tmp_path)
        values = config.model_dump(mode="json", exclude={"type", "rope", "rope_theta"})
        assert {field: getattr(theirs, family.name(field)) for field in values} == values
        share = {"partial_rotary_factor": getattr(config, "partial_rotary_factor", 1.0)}
        rope = {"rope_type": "default", "rope_theta": config.rope_theta, **share}
        assert {"partial_rotary_factor": 1.0, **theirs.rope_parameters} == rope
        assert (theirs.eos_token_id, theirs.bos_token_id, str(theirs.dtype)) == (5, None, "torch.bfloat16")
        assert theirs.architectures == [*family.architectures]
        for whole in (theirs.to_dict(), theirs.to_diff_dict()):
            assert parse_config({**whole, "dtype": "bfloat16"}) == (family, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_absent_field_means_what_transformers_means(name):
    from transformers import CONFIG_MAPPING

    family = FAMILIES[name]
    theirs = CONFIG_MAPPING[family.model_type]()
    _, config = parse_config({"model_type": family.model_type})
    values = config.model_dump(mode="json", exclude={"type", "rope", "rope_theta"})
    # Where their config has no such field.
    derived = {"head_dim": theirs.hidden_size // theirs.num_attention_heads, **theirs.rope_parameters}
    assert {field: getattr(theirs, family.name(field), derived.get(field)) for field in values} == values
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert set(family.defaults) <= {*family.config.model_fields, *ROPE_FIELDS}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_field_of_transformers_is_never_called_unknown(name):
    from transformers import CONFIG_MAPPING, GenerationConfig

    theirs = CONFIG_MAPPING[FAMILIES[name].model_type]
    fields = {field.name: getattr(theirs(), field.name) for field in dataclasses.fields(theirs)}
    fields |= {**GenerationConfig._get_default_generation_params(), "tie_last_hidden_states": False}
    whole = {**theirs().to_dict(), **fields, "architectures": None, "dtype": "float32"}
    assert parse_config({"model_type": name, **whole}) == parse_config({"model_type": name})
    for field in fields:
        for other in (7, "other", True, 0.5):
            message = refusal({"model_type": name, **whole, field: other})
            assert "is no field" not in message
            assert not message or field in message or field == "architectures"


def refusal(raw):
    """What is said of a config that is refused, and nothing of any other."""
    try:
        parse_config(raw)
    except UserError as error:
        return str(error)
    return ""


def test_no_field_is_both_meaningful_and_ignored():
    for name in FAMILIES:
        family = FAMILIES[name]
        assert not INERT & set(family.config.model_fields)
        assert not INERT & set(family.ignored)


REFUSED = {
    "unknown field": ({"sliding_window": 4096}, ["sliding_window = 4096", "does not implement"]),
    "switch of another": ({"use_alibi": True}, ["use_alibi = true", "is no field of LlamaForCausalLM"]),
    "misspelt text": ({"hiden_act": "gelu"}, ['hiden_act = "gelu"', "'hidden_act'"]),
    "misspelt object": ({"rope_scalling": {"factor": 2.0}}, ["rope_scalling = {"]),
    "misspelt field": ({"rms_norm_epsilon": 1e-3}, ["rms_norm_epsilon = 0.001", "'rms_norm_eps'"]),
    "dropout": ({"attention_dropout": 0.1}, ["attention_dropout = 0.1"]),
    "parallel windows": ({"sliding_window": 4096, "use_sliding_window": True}, ["sliding_window = 4096"]),
    "interleaved rope": ({"rope_interleaved": True}, ["rope_interleaved = true"]),
    "quantised by MLX": ({"quantization": {"bits": 4}}, ["quantization = ", "before quantisation"]),
    "code first": (
        {"auto_map": {"AutoModelForCausalLM": "x.BlendedForCausalLM"}, "quantization_config": {"bits": 4}},
        ["auto_map", "BlendedForCausalLM", "code that came with the checkpoint"],
    ),
    "code of one text": ({"auto_map": "modeling.Mine"}, ["auto_map", "code that came with the checkpoint"]),
    "architecture first": (
        {
            "architectures": ["BaichuanForCausalLM"],
            "auto_map": {"AutoModel": "x.Y"},
            "quantization_config": {"bits": 4},
        },
        ['"BaichuanForCausalLM" is not implemented', "nearest by its fields is LlamaForCausalLM"],
    ),
    "quantised": ({"quantization_config": {"bits": 4}}, ["quantization_config", "before quantisation"]),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, ["auto_map", "code that came with the checkpoint"]),
    "architecture": (
        {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        ["Qwen2ForCausalLM", "LlamaForCausalLM", "Adding a model family"],
    ),
    "task": ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
    "no architecture": ({"architectures": None, "model_type": None}, ["`architectures`", "`model_type`"]),
    "contradiction": ({"model_type": "mistral"}, ["LlamaForCausalLM", "mistral", "contradict"]),
    "too deep": ({"num_hidden_layers": 10**9}, ["num_hidden_layers = 1000000000", "at most 2,000", "slip"]),
    "too wide": ({"intermediate_size": 10**30}, ["intermediate_size = 1000000000000000000000000000000", "2147483647"]),
    "type": ({"hidden_size": "4096"}, ['hidden_size = "4096": must be a whole number']),
    "half a surrogate pair": ({"a\ud800\n": 7}, [r"a\ud800\n = 7", "is no field"]),
    "value": ({"num_hidden_layers": 0}, ["num_hidden_layers = 0", "greater than 0"]),
    "null": ({"vocab_size": None}, ["vocab_size = null"]),
    "activation": ({"hidden_act": "relu2"}, ['hidden_act = "relu2"', "silu"]),
    "heads": ({"num_key_value_heads": 5}, ["num_attention_heads 32", "num_key_value_heads 5"]),
    "uneven": ({"hidden_size": 4100}, ["hidden_size 4100", "num_attention_heads 32", "head_dim"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(case):
    change, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        parse_config({**V4, **change}, "some/config.json")
    message = str(error.value)
    assert all(word in message for word in ["some/config.json", *words]), message
    assert "\n" not in message


NUMBERS = sorted({name for name in {*V4, *V5} if type({**V4, **V5}[name]) in (int, float)} - {*INERT})


WRONG = {
    "text": "7",
    "list": [7],
    "object": {"a": 7},
    "switch": True,
    "negative": -1,
    "NaN": math.nan,
    "1e400": math.inf,
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_a_number_of_another_kind_is_one_message(name, value):
    """With a rope that has its length from elsewhere, whose own keys are not to blame."""
    rope = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    with pytest.raises(UserError, match=rf"^some/config.json: .*{name} = ") as error:
        parse_config({**V4, **rope, name: value}, "some/config.json")
    assert "\n" not in str(error.value)
    assert "rope_scaling.original" not in str(error.value)


def test_fields_that_change_nothing_are_let_through():
    neutral = {"attention_dropout": 0.0, "is_encoder_decoder": False, "per_layer_config": {}, "unknown": None}
    empty = {"auto_map": {}, "quantization_config": {}, "compression_config": None}
    notes = {"license": "mit", "_mine": 7, "run": {"steps": 7}, "tags": ["a"], "context_window_size": 2048}
    smollm = {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}
    assert parse_config({**V4, **neutral, **empty, **notes, **smollm, "pretraining_tp": 2}) == parse_config(V4)


def test_a_folder_without_a_good_config_is_refused(tmp_path):
    def message(folder):
        with pytest.raises(UserError) as error:
            read_config(folder)
        return str(error.value)

    assert "no such folder" in message("meta-llama/Llama-2-7b-hf")
    assert "hf download" in message("meta-llama/Llama-2-7b-hf")
    assert "has no config.json" in message(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "base model" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1,\n "b": }')
    assert "line 2" in message(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ' + "[" * 50000 + "]" * 50000 + "}")
    assert "too deeply" in message(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    assert "not valid JSON" in message(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    assert "JSON object" in message(tmp_path)
