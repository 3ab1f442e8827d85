"""Decoding with a cache, against transformers."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import torch
import transformers

import jaxllm
from jaxllm.core.errors import UserError
from jaxllm.generate.decode import Decoder, bucket
from jaxllm.generate.sample import Sampling

NEW = 24
TEXTS = ["Once upon a time", "One day, a big dog and a small cat went to the", "Lily", "The end. Tom was sad because"]


class Model(NamedTuple):
    folder: Path
    decode: Decoder
    params: Any
    prompts: list[list[int]]
    greedy: list[list[int]]  # by transformers, each prompt alone


def open_model(folder: Path) -> Model:
    jax.config.update("jax_disable_most_optimizations", True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    greedy = []
    for prompt in prompts:
        ids = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
        )
        greedy.append(ids[0, len(prompt) :].tolist())
    lm, params = jaxllm.load_hf(folder, param_dtype="float32")  # as transformers has read them
    return Model(folder, Decoder(lm), params, prompts, greedy)


@pytest.fixture(scope="module")
def model(shared) -> Model:
    return open_model(shared / "models/stories260K")


def test_prompts_of_different_lengths_decode_as_each_alone_in_transformers(model):
    assert len({len(prompt) for prompt in model.prompts}) == len(TEXTS)
    assert len({tuple(ids) for ids in model.greedy}) == len(TEXTS)
    assert model.decode(model.params, model.prompts, max_new_tokens=NEW) == model.greedy


@pytest.mark.full
@pytest.mark.parametrize("name", ["stories3M", "tinystories-656k", "tinystories-656k-bf16"])
def test_other_models(shared, name):
    model = open_model(shared / "models" / name)
    assert model.decode(model.params, model.prompts, max_new_tokens=NEW) == model.greedy


def test_the_greedy_text_of_the_reference(model):
    reference = json.loads((model.folder / "reference.json").read_text())
    wanted = reference["greedy_new_ids"]
    assert len(wanted) > 50
    assert model.decode(model.params, [reference["prompt_ids"]], max_new_tokens=len(wanted)) == [wanted]


def test_a_prompt_stops_at_its_first_stop_token_and_the_others_go_on(model):
    stops = [model.greedy[0][7], model.greedy[1][15]]
    wanted = []
    for ids in model.greedy:
        ends = [place for place, token in enumerate(ids) if token in stops]
        wanted.append(ids[: ends[0]] if ends else ids)
    assert len({len(ids) for ids in wanted}) > 1
    assert model.decode(model.params, model.prompts, max_new_tokens=NEW, stop_ids=stops) == wanted


def test_samples_follow_the_seed(model):
    def sample(seed: int, sampling: Sampling) -> list[list[int]]:
        return model.decode(model.params, model.prompts, max_new_tokens=NEW, sampling=sampling, seed=seed)

    hot = Sampling(1.0, top_p=0.95)
    assert sample(3, hot) == sample(3, hot)
    assert sample(3, hot) != sample(4, hot)
    assert sample(3, Sampling(1.0, top_k=1)) == model.greedy


@pytest.mark.parametrize(
    "sampling",
    [Sampling(0.8, top_k=9, repetition_penalty=1.2), pytest.param(Sampling(1.0), marks=pytest.mark.full)],
    ids=["narrowed", "plain"],
)
def test_a_prompt_draws_what_it_draws_alone_and_its_copies_draw_anew(model, sampling):
    def sample(prompts: list[list[int]]) -> list[list[int]]:
        return model.decode(model.params, prompts, max_new_tokens=NEW, sampling=sampling, seed=5)

    together = sample([*model.prompts, model.prompts[0]])
    assert together[: len(TEXTS)] == [sample([prompt])[0] for prompt in model.prompts]
    assert together[-1] != together[0]
    assert together[-1] == sample([model.prompts[0]] * 2)[1]


@pytest.mark.parametrize("penalty", [1.3, pytest.param(0.8, marks=pytest.mark.full)])
def test_the_repetition_penalty_counts_prompt_and_completion_and_no_padding(model, penalty):
    reference = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32)
    wanted = []
    for prompt in model.prompts:
        ids = reference.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=NEW,
            repetition_penalty=penalty,
            eos_token_id=None,
            pad_token_id=0,
        )
        wanted.append(ids[0, len(prompt) :].tolist())
    assert wanted != model.greedy
    sampling = Sampling(repetition_penalty=penalty)
    assert model.decode(model.params, model.prompts, max_new_tokens=NEW, sampling=sampling) == wanted


def test_prompts_and_lengths_of_a_bucket_share_their_programs(model):
    """Two programs, whatever is asked for within a bucket: one for the prompts, one for every further token."""
    programs = []
    for length, new in [(9, 20), (16, 17), (12, 24), (10, 19)]:
        model.decode(model.params, [list(range(3, 3 + length))], max_new_tokens=new)
        programs.append(model.decode.advance._cache_size())
        assert (bucket(length), bucket(16 + new)) == (16, 40)
    assert len(set(programs)) == 1


def test_buckets_hold_their_lengths_and_waste_little():
    sizes = [bucket(length) for length in range(1, 5000)]
    assert all(length <= size <= max(8, 1.25 * length + 1, length + 7) for length, size in enumerate(sizes, 1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) < 40


def test_prompts_that_cannot_be_completed_are_refused(model):
    with pytest.raises(UserError, match="a prompt has no token"):
        model.decode(model.params, [[1, 2], []], max_new_tokens=3)
    with pytest.raises(UserError, match="a prompt has 512 tokens, and the model's 512 positions"):
        model.decode(model.params, [[1, 2], [1] * 512], max_new_tokens=3)


def test_a_completion_ends_at_the_last_position_and_the_others_go_on(model):
    long = [1] + [403] * 505
    completions = model.decode(model.params, [long, model.prompts[0]], max_new_tokens=NEW)
    assert [len(ids) for ids in completions] == [512 - 506, NEW]
    assert completions[1] == model.greedy[0]
