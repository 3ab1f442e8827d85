"""What `generation_config.json` says of how a model is meant to be sampled, under transformers' names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from jaxllm.core.config import Section
from jaxllm.core.config.requirement import first_problem
from jaxllm.core.errors import UserError
from jaxllm.generate.sample import Sampling

# What transformers 5 has and this page has not, with the values under which it does nothing besides null.
NEUTRAL: Mapping[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "suppress_tokens": None,
    "token_healing": False,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}

# What changes no token: how transformers computes, and what it returns; settings of beams and of helping models, which
# do nothing by themselves; tokens of encoders; and what describes the file.
INERT = {
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "renormalize_logits",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "trust_remote_code",
    "use_cache",
    "use_mtp",
}

TOP_K = 50  # what transformers takes where a file samples and has no top_k


def _several(value: Any) -> Any:
    """One is a list of one; null is none."""
    return [] if value is None else value if isinstance(value, list) else [value]


class Defaults(Section):
    """The fields of `generation_config.json` that matter here; every other is left aside."""

    model_config = ConfigDict(extra="ignore")

    do_sample: bool | None = None
    temperature: NonNegativeFloat | None = None
    top_k: NonNegativeInt | None = None
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: PositiveFloat | None = None
    max_new_tokens: PositiveInt | None = None
    max_length: PositiveInt | None = None
    eos_token_id: Annotated[list[NonNegativeInt], BeforeValidator(_several)] = Field(default_factory=list)
    stop_strings: Annotated[list[str], BeforeValidator(_several)] = Field(default_factory=list)

    def sampling(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> Sampling:
        """What is given, and for the rest what the file says.

        Without a temperature the file decides whether to sample (`do_sample`). Its temperature, top_k, top_p and min_p
        count where it samples, and where tokens are sampled at all. A file that samples and has no top_k has one of 50,
        as in transformers. A top_k of 0, a top_p of 1 and a min_p of 0 switch the file's off. Raises UserError for a
        value that means nothing.
        """
        file = self if self.do_sample else Defaults()
        if temperature is None:
            temperature = (1.0 if file.temperature is None else file.temperature) if file.do_sample else 0.0
        if temperature == 0:
            file = Defaults()
        if top_k is None:
            top_k = TOP_K if file.do_sample and file.top_k is None else file.top_k
        top_p = file.top_p if top_p is None else top_p
        min_p = file.min_p if min_p is None else min_p
        penalty = self.repetition_penalty if repetition_penalty is None else repetition_penalty
        return Sampling(
            temperature,
            None if top_k == 0 else top_k,
            None if top_p == 1 else top_p,
            None if min_p == 0 else min_p,
            1.0 if penalty is None else penalty,
        )


def read_defaults(raw: Mapping[str, Any], file: str | Path) -> tuple[Defaults, list[str]]:
    """The defaults in the content `raw` of `file`, and what else it says that may change the output, as `name = value`.

    Raises UserError naming `file`, field and value.
    """
    try:
        defaults = Defaults(**raw)
    except ValidationError as error:
        place, value, why = first_problem(error)
        raise UserError(f"{file}: {'.'.join(map(str, place))} = {value!r}: {why}") from error
    understood = INERT | Defaults.model_fields.keys()
    missing = [
        f"{name} = {value!r:.60}"
        for name, value in raw.items()
        if value not in (None, NEUTRAL.get(name)) and name not in understood and not name.startswith("_")
    ]
    return defaults, missing


def of_model_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of generation in a config.json, where transformers looks for them if there is no file of them."""
    return {name: value for name, value in raw.items() if name in Defaults.model_fields or name in NEUTRAL}
