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
from jaxllm.core.errors import UserError
from jaxllm.generate.sample import Sampling

# What we do not have, with the values under which it does nothing besides null.
NEUTRAL: Mapping[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "constraints": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0.0,
    "sequence_bias": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1.0,
}


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
        count where it samples, and where tokens are sampled at all. A top_k of 0, a top_p of 1 and a min_p of 0
        switch the file's off. Raises UserError for a value that means nothing.
        """
        file = self if self.do_sample else Defaults()
        if temperature is None:
            temperature = (1.0 if file.temperature is None else file.temperature) if file.do_sample else 0.0
        if temperature == 0:
            file = Defaults()
        top_k = file.top_k if top_k is None else top_k
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
    """The defaults in the content `raw` of `file`, and what it asks for that is not implemented, as `name = value`.

    Raises UserError naming `file`, field and value.
    """
    try:
        defaults = Defaults(**raw)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in detail["loc"])
        raise UserError(f"{file}: {name} = {detail['input']!r}: {detail['msg']}") from error
    missing = [f"{name} = {raw[name]!r}" for name in NEUTRAL if raw.get(name) not in (None, NEUTRAL[name])]
    return defaults, missing
