"""`config.json`, read into a family's config and written back, in the forms of transformers 4 and 5.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 `rope_parameters` and
`dtype`. Both are read. What came in is what goes out, except what training changed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxllm.core.errors import UserError, did_you_mean, nearest
from jaxllm.hf.rope import FIELDS as ROPE_FIELDS
from jaxllm.hf.rope import read_rope, shown, write_rope, write_theta
from jaxllm.models import FAMILIES
from jaxllm.models.base import Family, FamilyConfig

RawConfig = dict[str, Any]

_BOOKKEEPING = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
dtype model_type tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed
unsloth_version use_bfloat16 bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id
gradient_checkpointing max_sequence_length pretraining_tp
"""
# generation_config.json's business
_GENERATION = """
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
output_scores prefix remove_invalid_values repetition_penalty return_dict return_dict_in_generate
suppress_tokens temperature top_k top_p typical_p use_cache
"""
_OTHER_TASKS = """
chunk_size_feed_forward finetuning_task id2label is_decoder label2id num_labels problem_type
task_specific_params tf_legacy_loss
"""
# Fields that never change what a causal language model computes.
INERT = frozenset((_BOOKKEEPING + _GENERATION + _OTHER_TASKS).split())

# Fields of every family that change nothing at these values alone.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
}

REFUSED = {
    "auto_map": "it asks to run code that came with the checkpoint, which is never done; where that is the "
    "architecture that transformers has by this name, remove the field",
    "quantization_config": "quantised weights are not implemented; use the checkpoint before quantisation",
}

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file cannot be read or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content


def read_config(folder: str | Path) -> RawConfig:
    """The `config.json` of a checkpoint folder, as it is. Raises UserError if there is no good one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder. A model is a folder with config.json and safetensors files; "
            "one of the Hugging Face hub is fetched by `hf download NAME --local-dir FOLDER`."
        )
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "an adapter: give the folder of its base model" if adapter else "not the folder of a model"
        raise UserError(f"{folder}: has no config.json, so it is {what}")
    return read_json(folder / "config.json")


def parse_config(raw: RawConfig, file: str | Path = "config.json") -> tuple[Family, FamilyConfig]:
    """The family that `raw` names, and its config.

    An absent field means what transformers takes it to mean. Raises UserError naming `file`, field and value
    for an architecture that is not implemented, and for such a field unless its value changes nothing.
    """
    for name, why in REFUSED.items():
        if raw.get(name) is not None:
            raise UserError(f"{file}: {name} = {shown(raw[name])} is refused: {why}")
    family = _family(raw, file)
    fields = set(family.config.model_fields) - {"type", "rope", *ROPE_FIELDS}
    neutral = {**NEUTRAL, **family.neutral}
    values = dict(family.defaults)
    for name, value in raw.items():
        if name in fields:
            values[name] = value
        elif not (value is None or name in INERT or name in ROPE_FIELDS or value in neutral.get(name, ())):
            raise UserError(
                f"{file}: this version does not implement {name} = {shown(value)}.{did_you_mean(name, fields)} Remove "
                "the field only if you know that the model computes the same without it."
            )
    values |= read_rope(raw, file, values["max_position_embeddings"])
    try:
        return family, family.config(**values)
    except ValidationError as error:
        problems = "; ".join(
            "".join(f"{part} = {shown(detail['input'])}: " for part in detail["loc"])
            + detail["msg"].removeprefix("Value error, ")
            for detail in error.errors(include_url=False)
        )
        raise UserError(f"{file}: {problems}") from error


def write_config(
    family: Family,
    config: FamilyConfig,
    *,
    source: RawConfig | None = None,
    dtype: str | None = None,
    special_ids: Mapping[str, Any] | None = None,
) -> RawConfig:
    """The `config.json` of a model.

    source: the file that the model came with; only what changed is updated, in the form that the file has.
        Without one the result has a form that transformers 4 and 5 read to the same effect.
    dtype: the dtype of the weights, such as "bfloat16"; None leaves what the source says.
    special_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, where they are known or changed.
    """
    values = config.model_dump(mode="json", exclude={"type"})
    special_ids = special_ids or {}
    if source is None:
        # Where these ids are absent transformers takes Llama 2's, which this tokenizer may not have.
        ids = {name: special_ids.get(name) for name in SPECIAL_IDS}
        head = {"architectures": [family.architecture], "model_type": family.model_type}
        del values["rope"]
        raw = {**head, **values, **ids, "torch_dtype": dtype or "float32"}
        write_rope(raw, config.rope, config.rope_theta)
        return raw
    raw: RawConfig = json.loads(json.dumps(source))
    before = parse_config(source)[1].model_dump(mode="json", exclude={"type"})
    changed = {name: value for name, value in values.items() if value != before[name]}
    raw.update({name: value for name, value in changed.items() if name not in ("rope", "rope_theta")})
    # An original length that is not given is max_position_embeddings.
    if "rope" in changed or ("max_position_embeddings" in changed and config.rope.type != "default"):
        write_rope(raw, config.rope, config.rope_theta)
    elif "rope_theta" in changed:
        write_theta(raw, config.rope_theta)
    raw.update(special_ids)
    if dtype is not None:
        for name in [name for name in ("dtype", "torch_dtype") if name in raw] or ["torch_dtype"]:
            raw[name] = dtype
    return raw


def _family(raw: RawConfig, file: str | Path) -> Family:
    """The family of `architectures`, or where that is absent of `model_type`."""
    families = [FAMILIES[name] for name in FAMILIES]
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    if architectures:
        known, what = {family.architecture: family for family in families}, "architecture"
        one = isinstance(architectures, list) and len(architectures) == 1
        given = architectures[0] if one else architectures
    elif model_type is not None:
        known, what, given = {family.model_type: family for family in families}, "model_type", model_type
    else:
        raise UserError(f"{file}: names neither `architectures` nor a `model_type`: which model is this?")
    if not isinstance(given, str) or given not in known:
        raise UserError(
            f"{file}: the {what} {shown(given)} is not implemented; the nearest that is: "
            f"{nearest(str(given), known, 0)} (all: {', '.join(sorted(known))}). "
            "The README says how to add one, under “Adding a model family”."
        )
    family = known[given]
    if model_type is not None and model_type != family.model_type:
        raise UserError(
            f"{file}: architectures = {shown(given)} and model_type = {shown(model_type)} contradict each "
            f"other; the model_type of {given} is {family.model_type}"
        )
    return family
