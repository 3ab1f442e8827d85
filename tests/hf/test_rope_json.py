"""Rotary embedding in config.json: every kind, in the forms of transformers 4 and 5, in and out."""

import json

import pytest
from transformers import LlamaConfig as Reference

from jaxllm.core.errors import UserError
from jaxllm.hf.config import parse_config, write_config
from jaxllm.models import FAMILIES
from jaxllm.nn.rope import ROPES, DefaultRope, LinearRope, LongRope, YarnRope

SIZES = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
# One table of each kind, as checkpoints have them.
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 8, "mscale": 1.0, "mscale_all_dim": 2},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2, 4, 8],
        "original_max_position_embeddings": 16,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
FORMS = {
    "transformers 4": lambda kind: {"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **KINDS[kind]}},
    "old transformers 4": lambda kind: {"rope_theta": 5e5, "rope_scaling": {"type": kind, **KINDS[kind]}},
    "transformers 5": lambda kind: {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **KINDS[kind]}},
}


def parsed(change):
    return parse_config({**SIZES, **change}, "some/config.json")[1]


def test_every_kind_is_here():
    assert set(KINDS) == set(ROPES)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms_mean_the_same_and_come_back_as_they_were(kind):
    configs = []
    for form in FORMS.values():
        raw = {**SIZES, **form(kind)}
        family, config = parse_config(raw)
        assert write_config(family, config, source=raw) == raw
        configs.append(config)
    assert configs[0] == configs[1] == configs[2]
    assert (configs[0].rope.type, configs[0].rope_theta) == (kind, 5e5)
    given = json.loads(configs[0].rope.model_dump_json())
    assert {key: given[key] for key in KINDS[kind]} == KINDS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_what_we_write_and_we_what_it_writes(kind):
    config = parsed(FORMS["transformers 5"](kind))
    family = FAMILIES["llama"]
    raw = write_config(family, config)
    theirs = Reference(**raw)
    for key, value in {"rope_theta": 5e5, "rope_type": kind, **KINDS[kind]}.items():
        assert theirs.rope_parameters[key] == value
    for written in (theirs.to_dict(), theirs.to_diff_dict()):
        assert parse_config({**written, "architectures": raw["architectures"]})[1] == config


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_rope_is_written_in_the_form_of_the_file(form):
    raw = {**SIZES, **FORMS[form]("yarn")}
    family, config = parse_config(raw)
    for change in (
        {"rope": LinearRope(factor=3)},
        {"rope": DefaultRope()},
        {"rope": LongRope(short_factor=(1, 1, 1, 1), long_factor=(2, 2, 2, 2), original_max_position_embeddings=4)},
        {"rope_theta": 7.0},
        {"max_position_embeddings": 128},
    ):
        changed = config.model_copy(update=change)
        out = write_config(family, changed, source=raw)
        assert ("rope_parameters" in out, "rope_scaling" in out) == (form == "transformers 5", form != "transformers 5")
        assert parse_config(out)[1] == changed


def test_an_original_length_that_is_not_given_stays_what_it_was():
    raw = {**SIZES, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    family, config = parse_config(raw)
    assert config.rope == YarnRope(factor=4.0, original_max_position_embeddings=64)
    assert Reference(**raw).rope_parameters["original_max_position_embeddings"] == 64
    longer = config.model_copy(update={"max_position_embeddings": 256})
    assert parse_config(write_config(family, longer, source=raw))[1] == longer


def test_what_stands_beside_the_table_counts():
    """As in transformers, which reads both keys from the whole config too."""
    long = {key: value for key, value in KINDS["longrope"].items() if key != "original_max_position_embeddings"}
    outside = {"rope_scaling": {"type": "longrope", **long}, "original_max_position_embeddings": 16}
    assert parsed(outside).rope == parsed(FORMS["transformers 5"]("longrope")).rope
    outside = {"rope_scaling": {"rope_type": "proportional"}, "partial_rotary_factor": 0.5}
    assert parsed(outside).rope == parsed(FORMS["transformers 5"]("proportional")).rope
    plain = {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 1.0}, "partial_rotary_factor": 1.0}
    assert parsed({**plain, "original_max_position_embeddings": 64}) == parsed({})


LLAMA3 = {"rope_type": "llama3", **KINDS["llama3"]}
LONG = {"rope_type": "longrope", **KINDS["longrope"]}
REFUSED = {
    "unknown kind": ({"rope_scaling": {"rope_type": "yarm"}}, ['rope_scaling.rope_type = "yarm"', "'yarn'", "Known:"]),
    "unknown kind, old": ({"rope_scaling": {"type": "su", "factor": 2.0}}, ['rope_scaling.type = "su"']),
    "kind of a wrong type": ({"rope_parameters": {"rope_type": ["yarn"]}}, ['rope_parameters.rope_type = ["yarn"]']),
    "no kind": ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling.factor = 2.0", "unknown", "default"]),
    "unknown key": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 1}},
        ["rope_scaling.beta_fast = 1 is unknown", "linear", "Its keys: factor."],
    ),
    "misspelt key": (
        {"rope_parameters": {**LLAMA3, "low_freq": 1.0}},
        ["rope_parameters.low_freq = 1.0", "'low_freq_factor'"],
    ),
    "missing key": (
        {"rope_parameters": {key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}},
        ["rope_parameters lacks low_freq_factor", "llama3"],
    ),
    "missing length": (
        {"rope_parameters": {key: value for key, value in LLAMA3.items() if not key.startswith("original")}},
        ["rope_parameters lacks original_max_position_embeddings"],
    ),
    "text": ({"rope_scaling": {"type": "linear", "factor": "2"}}, ['rope_scaling.factor = "2"', "number"]),
    "shrinking": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["rope_scaling.factor = 0.5", "equal to 1"]),
    "no table": ({"rope_scaling": "linear"}, ['rope_scaling = "linear"', "object"]),
    "by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        ["rope_parameters.full_attention", "unknown"],
    ),
    "partial": ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5", "default"]),
    "partial, inside": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
        ["rope_scaling.partial_rotary_factor = 0.5", "linear"],
    ),
    "two bases": (
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        ["rope_theta = 500000.0", "rope_parameters.rope_theta = 1000000.0", "contradict"],
    ),
    "two kinds": (
        {"rope_scaling": {"type": "dynamic", "rope_type": "linear", "factor": 2.0}},
        ['rope_scaling.rope_type = "linear"', 'rope_scaling.type = "dynamic"', "contradict"],
    ),
    "two tables": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        ["rope_scaling and rope_parameters contradict"],
    ),
    "two lengths": (
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
        ["rope_scaling.original_max_position_embeddings = 16", "original_max_position_embeddings = 32", "contradict"],
    ),
    "short list": ({"rope_scaling": {**LONG, "long_factor": [1.0]}}, ["long_factor has 1 numbers", "must have 4"]),
    "order": ({"rope_scaling": {**LLAMA3, "high_freq_factor": 0.5}}, ["high_freq_factor 0.5", "above"]),
    "narrow heads": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "head_dim": 2}, ["head_dim above 2"]),
    "base of one": ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "rope_theta": 1.0}, ["rope_theta above 1"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(case):
    change, words = REFUSED[case]
    with pytest.raises(UserError) as error:
        parsed(change)
    message = str(error.value)
    assert all(word in message for word in ["some/config.json", *words]), message
    assert "\n" not in message
