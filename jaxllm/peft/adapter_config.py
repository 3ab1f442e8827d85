"""`adapter_config.json`, as HF PEFT or a run has written it, read into the section that describes the adapter."""

from pathlib import Path
from typing import Annotated, Any, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jaxllm.core.config.requirement import first_problem
from jaxllm.core.errors import UserError
from jaxllm.hf.config import read_json
from jaxllm.hf.rope import shown
from jaxllm.peft.base import ADAPTERS, PeftConfig
from jaxllm.peft.files import AdapterFiles

# Kinds of init_lora_weights that draw nothing but the adapter's first values; of the others, a base that is changed
# first, so that the adapter is one of that base.
_DRAWS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


Whole = Annotated[int, Field(ge=0, lt=2**31)]
Number = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class _OfEveryMethod(BaseModel):
    """Fields that change nothing of what a finished adapter computes, whatever its method."""

    model_config = ConfigDict(strict=True)

    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool | None = None
    peft_type: str | None = None
    peft_version: str | None = None
    revision: str | None = None
    task_type: str | None = None


class _Inert(_OfEveryMethod):
    """These and the fields that change nothing with some methods."""

    # of methods with matrices
    alpha_pattern: dict[str, Any] | None = None
    corda_config: dict[str, Any] | None = None
    ensure_weight_tying: bool | None = None
    eva_config: dict[str, Any] | None = None
    init_ia3_weights: bool | None = None
    init_lora_weights: bool | str | None = None
    layers_pattern: str | list[str] | None = None
    loftq_config: dict[str, Any] | None = None
    lora_dropout: Number | None = None
    lora_ga_config: dict[str, Any] | None = None
    megatron_core: str | None = None
    qalora_group_size: Whole | None = None
    r: Whole | None = None
    use_rslora: bool | None = None
    # of AdaLoRA's training
    beta1: Number | None = None
    beta2: Number | None = None
    deltaT: Whole | None = None
    orth_reg_weight: Number | None = None
    target_r: Whole | None = None
    tfinal: Whole | None = None
    tinit: Whole | None = None
    total_step: Whole | None = None
    # of virtual tokens
    encoder_dropout: Number | None = None
    encoder_hidden_size: Whole | None = None
    encoder_num_layers: Whole | None = None
    encoder_reparameterization_type: str | None = None
    init_weights: str | None = None
    num_attention_heads: Whole | None = None
    num_layers: Whole | None = None
    num_transformer_submodules: Whole | None = None
    prefix_projection: bool | None = None
    prompt_tuning_init: str | None = None
    prompt_tuning_init_text: str | None = None
    token_dim: Whole | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    tokenizer_name_or_path: str | None = None


def read_adapter_config(file: Path) -> tuple[PeftConfig, dict[str, Any]]:
    """The section that describes the adapter, and the whole content of the file.

    Raises UserError naming file, field and value for what is wrong, and for what is not implemented.
    """
    raw = read_json(file)
    kind = raw.get("peft_type")
    if not isinstance(kind, str) or kind not in ADAPTERS:
        raise UserError(f"{file}: peft_type is {shown(kind)}, which is not implemented; {', '.join(ADAPTERS)} are")
    chosen, files = ADAPTERS[kind], ADAPTERS[kind].files
    assert files is not None  # of a method that is in ADAPTERS
    inert = (*_OfEveryMethod.model_fields, *files.inert)
    for name, value in raw.items():
        if name not in (*files.described, *inert) and value not in (None, False, [], {}):
            raise UserError(
                f"{file}: {name} is {shown(value)}, which is not implemented; merge the adapter with HF peft "
                "(merge_and_unload), and take the model that it saves"
            )
    try:
        _Inert.model_validate({name: raw[name] for name in inert if name in raw})
    except ValidationError as error:
        raise _wrong(file, raw, error) from error
    _check_fields(file, raw, files)
    given = {name: _as_settings(name, raw[name], files) for name in files.described if raw.get(name) is not None}
    fields = chosen.model_fields
    kind = get_args(fields["type"].annotation)[0]
    try:
        method = chosen(type=kind, **{name: value for name, value in given.items() if name in fields})
        if files.of_files is not None:
            files.of_files.model_validate(given)
    except ValidationError as error:
        raise _wrong(file, raw, error) from error
    return method, raw


def _as_settings(name: str, value: Any, files: AdapterFiles) -> Any:
    """A value as a section has it. A list is in order if it is one of texts or numbers: HF PEFT's order is chance."""
    if name == "layers_to_transform" and type(value) is int:
        return (value,)
    if not isinstance(value, list):
        return value
    items = cast(list[Any], value)
    alike = {type(item) for item in items} in ({str}, {int})
    return tuple(sorted(items) if alike and name not in files.in_order else items)


def _wrong(file: Path, raw: dict[str, Any], error: ValidationError) -> UserError:
    place, _, why = first_problem(error)
    if not place:
        return UserError(f"{file}: {why}")
    name = str(place[0])
    return UserError(f"{file}: {name} is {shown(raw.get(name))}: {why}")


def _check_fields(file: Path, raw: dict[str, Any], files: AdapterFiles) -> None:
    """Raises UserError for a value, of the right type, that means something which is not implemented."""
    task = raw.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{file}: task_type is {shown(task)}; the model must be a language model, CAUSAL_LM")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _DRAWS:
        if init.lower().startswith(_CHANGES_BASE):
            raise UserError(
                f"{file}: init_lora_weights is {shown(init)}, which also changes the base model; save the adapter with "
                "HF peft's path_initial_model_for_weight_conversion, which makes it a plain one, or merge it there "
                "(merge_and_unload), and take the model that it saves"
            )
        raise UserError(f"{file}: init_lora_weights is {shown(init)}; known: true, false, {', '.join(_DRAWS)}")
    pattern = raw.get("layers_pattern")
    patterns = [pattern] if isinstance(pattern, str) else pattern
    if raw.get("layers_to_transform") and patterns and "layers" not in patterns:
        raise UserError(
            f"{file}: layers_pattern is {shown(pattern)}, and the layers of the models that are implemented are called "
            "layers; correct it, or remove it"
        )
    if "target_modules" in files.described and raw.get("target_modules") is None:
        raise UserError(
            f"{file}: target_modules is missing, and says which matrices the adapter is for; write the list, such as "
            '["q_proj", "v_proj"]'
        )
