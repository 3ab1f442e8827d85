"""What generation_config.json means, and who wins."""

import pytest

from jaxllm.core.errors import UserError
from jaxllm.generate.defaults import INERT, NEUTRAL, Defaults, of_model_config, read_defaults
from jaxllm.generate.sample import Sampling

SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}


def sampling(file, **given):
    return read_defaults(file, "generation_config.json")[0].sampling(**given)


@pytest.mark.parametrize(
    ("file", "given", "wanted"),
    [
        ({}, {}, Sampling()),
        ({}, {"temperature": 0.7, "top_k": 3}, Sampling(0.7, 3)),
        (SAMPLING, {}, Sampling(0.6, 20, 0.9, 0.05, 1.1)),
        (SAMPLING, {"temperature": 1.5, "top_p": 0.5}, Sampling(1.5, 20, 0.5, 0.05, 1.1)),
        (SAMPLING, {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}, Sampling(0.6)),
        (SAMPLING, {"temperature": 0.0}, Sampling(repetition_penalty=1.1)),
        # transformers has a top_k of 50 where a file samples without one.
        ({"do_sample": True}, {}, Sampling(1.0, 50)),
        ({"do_sample": True, "temperature": 0.3}, {"top_p": 0.5}, Sampling(0.3, 50, 0.5)),
        ({"do_sample": True}, {"top_k": 0}, Sampling(1.0)),
        ({"do_sample": True, "temperature": 0}, {}, Sampling()),
        ({"do_sample": True, "top_k": 0, "top_p": 1.0}, {}, Sampling(1.0)),
        # As in transformers, a file that does not sample has a temperature for nothing.
        ({**SAMPLING, "do_sample": False}, {}, Sampling(repetition_penalty=1.1)),
        ({**SAMPLING, "do_sample": None}, {"temperature": 1.0}, Sampling(1.0, repetition_penalty=1.1)),
    ],
    ids=str,
)
def test_what_is_given_wins_and_the_file_says_the_rest(file, given, wanted):
    assert sampling(file, **given) == wanted


def test_one_or_several_ends():
    def ends(file):
        defaults, _ = read_defaults(file, "file")
        return defaults.eos_token_id, defaults.stop_strings

    assert ends({}) == ([], [])
    assert ends({"eos_token_id": 2, "stop_strings": "END"}) == ([2], ["END"])
    assert ends({"eos_token_id": [2, 5], "stop_strings": ["a", "b"]}) == ([2, 5], ["a", "b"])
    assert ends({"eos_token_id": None}) == ([], [])


def test_what_is_not_implemented_is_named():
    file = {**NEUTRAL, "num_beams": 4, "no_repeat_ngram_size": 3, "max_length": 20, "transformers_version": "5.0.0"}
    assert sorted(read_defaults(file, "file")[1]) == ["no_repeat_ngram_size = 3", "num_beams = 4"]
    assert read_defaults(NEUTRAL, "file")[1] == []
    file = {"max_time": 2.0, "token_healing": True, "user_token_id": 195, "early_stopping": True, "pad_token_id": 0}
    assert read_defaults(file, "file")[1] == ["max_time = 2.0", "token_healing = True", "user_token_id = 195"]


def test_every_field_of_transformers_is_read_named_or_known_to_change_nothing():
    from transformers import GenerationConfig

    fields = {name for name in GenerationConfig().__dict__ if not name.startswith("_")}
    assert fields == fields & {*Defaults.model_fields, *NEUTRAL, *INERT}
    assert not {*NEUTRAL} & INERT
    assert not Defaults.model_fields.keys() & ({*NEUTRAL} | INERT)
    theirs = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    for name, value in NEUTRAL.items():
        assert name in theirs, name
        assert theirs[name] in (None, value), name


def test_without_the_file_the_model_s_config_says_it():
    raw = {"hidden_size": 8, "max_position_embeddings": 64, "do_sample": True, "max_length": 33, "num_beams": 4}
    defaults, missing = read_defaults(of_model_config(raw), "config.json")
    assert (defaults.sampling(), defaults.max_length, missing) == (Sampling(1.0, 50), 33, ["num_beams = 4"])


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({"temperature": -1.0}, "file: temperature = -1.0: must be greater than or equal to 0"),
        ({"temperature": "hot"}, "file: temperature = 'hot': must be a number"),
        ({"top_p": 1.5}, "file: top_p = 1.5"),
        ({"min_p": -0.1}, "file: min_p = -0.1"),
        ({"repetition_penalty": 0}, "file: repetition_penalty = 0"),
        ({"max_length": 0}, "file: max_length = 0"),
        ({"max_length": 1e30}, "file: max_length = 1e"),
        ({"eos_token_id": "</s>"}, r"file: eos_token_id.0 = '</s>'"),
    ],
    ids=str,
)
def test_wrong_values_are_named(file, message):
    with pytest.raises(UserError, match=message):
        read_defaults(file, "file")
