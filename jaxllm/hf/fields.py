"""Which fields of `config.json` a family has, which change nothing, and which are refused."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxllm.core.errors import nearest
from jaxllm.hf.rope import FIELDS as ROPE_FIELDS
from jaxllm.hf.rope import TABLES
from jaxllm.models.family import Family, Ignored

_BOOKKEEPING = """
_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation
dtype experts_implementation keys_to_ignore_at_inference model_type name_or_path tie_last_hidden_states
tokenizer_class torch_dtype torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version
use_bfloat16 use_return_dict bos_token_id decoder_start_token_id eos_token_id pad_token_id sep_token_id
gradient_checkpointing pretraining_tp
"""
# generation_config.json's business
_GENERATION = """
assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation
diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff
eta_cutoff exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length
min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
num_return_sequences output_attentions output_hidden_states output_scores prefix remove_invalid_values
repetition_penalty return_dict return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p
typical_p use_cache
"""
_OTHER_TASKS = """
chunk_size_feed_forward finetuning_task id2label is_decoder label2id num_labels problem_type
task_specific_params tf_legacy_loss
"""
# How long texts are cut or served (by MLC LLM), and how fast the same numbers are computed.
_LIMITS = """
attention_sink_size bf16 context_window_size fp16 fp32 max_batch_size max_seq_length max_sequence_length
model_max_length prefill_chunk_size seq_length tensor_parallel_shards tokenizer_model_max_length
use_flash_attention use_flash_attn
"""
# Fields that never change what a causal language model computes.
INERT = frozenset((_BOOKKEEPING + _GENERATION + _OTHER_TASKS + _LIMITS).split())


def _of_one_kind(value: Any, raw: Mapping[str, Any]) -> bool:
    """Whether `layer_types` says of every layer what the whole model is without it."""
    kind = "sliding_attention" if raw.get("sliding_window") else "full_attention"
    return isinstance(value, list) and all(one == kind for one in value)


# Fields of every family that change nothing at these values alone.
IGNORED: Mapping[str, Ignored] = {
    "add_cross_attention": (False,),
    "is_encoder_decoder": (False,),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    # What other architectures have, switched off.
    **dict.fromkeys(("attention_bias", "bias", "lm_head_bias", "mlp_bias", "qkv_bias", "use_bias"), (False,)),
    **dict.fromkeys(("qk_layernorm", "qk_norm", "use_qk_norm", "use_sliding_window"), (False,)),
    "layer_types": _of_one_kind,
    "sliding_window": (),
}

# How a checkpoint says that its weights are quantised.
QUANTIZED = ("quantization_config", "quantization", "compression_config")
CODE = "auto_map"


class Fields(NamedTuple):
    """The fields of a `config.json`, sorted by what they are to a family.

    values: what the family's config takes, by our names. notes: the names of those that no code of the family reads, in
    transformers either, and that say nothing of a computation. refused: all others, of which some are known
    and have a value that is not implemented.
    """

    values: dict[str, Any]
    notes: list[str]
    refused: dict[str, Any]


def names_of(family: Family) -> dict[str, str]:
    """The fields that the family's config takes: their names in `config.json` → ours. The fields of the rotary
    embedding are read together."""
    ours = set(family.config.model_fields) - {"type", "rope", *ROPE_FIELDS}
    return {family.name(field): field for field in ours}


def ignored_of(family: Family) -> Mapping[str, Ignored]:
    """The fields that are not implemented in the family, each with the values under which it changes nothing."""
    return {**IGNORED, **family.ignored}


def _changes_nothing(ignored: Ignored, value: Any, raw: Mapping[str, Any]) -> bool:
    return ignored(value, raw) if callable(ignored) else value in ignored


def sort_fields(raw: Mapping[str, Any], family: Family) -> Fields:
    """The fields of `raw`; `auto_map`, quantisation and the rotary embedding are left to those who read them."""
    names, ignored = names_of(family), ignored_of(family)
    elsewhere = {*INERT, *ROPE_FIELDS, *QUANTIZED, CODE}
    fields = Fields({}, [], {})
    for name, value in raw.items():
        if name in names:
            fields.values[names[name]] = value
        elif value is None or name in elsewhere or _changes_nothing(ignored.get(name, ()), value, raw):
            continue
        elif name not in ignored and _is_note(name, value, family):
            fields.notes.append(name)
        else:
            fields.refused[name] = value
    return fields


def _is_note(name: str, value: Any, family: Family) -> bool:
    """Whether an unknown field says nothing of a computation, which sizes, factors and switches may do."""
    if name.startswith("_"):
        return True
    if isinstance(value, str):
        texts = [field for field, default in family.defaults.items() if isinstance(default, str)]
        return nearest(name, texts) is None
    if isinstance(value, dict) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return nearest(name, {*TABLES, *names_of(family)}) is None
    return False
