"""`config.json`, read into a family's config and written back, in the forms of transformers 4 and 5.

transformers 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, transformers 5 `rope_parameters` and
`dtype`. Both are read. What came in is what goes out, except what training changed.
"""

import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jaxllm.core.config.requirement import requirement
from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.hf.architecture import family_of
from jaxllm.hf.fields import CODE, ignored_of, names_of, sort_fields
from jaxllm.hf.rope import PARTIAL, read_rope, shown, write_rope, write_theta
from jaxllm.models.family import Family, FamilyConfig

log = logging.getLogger(__name__)

RawConfig = dict[str, Any]

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file cannot be read or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}); copy or download it again") from error
    except RecursionError:
        raise UserError(f"{path}: nests lists or objects too deeply to be read; copy or download it again") from None
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
    for an architecture that is not implemented, and for such a field unless its value changes nothing. What is
    left out for that reason is logged, once.
    """
    family = family_of(raw, file)
    fields = sort_fields(raw, family)
    if fields.refused:
        raise UserError(f"{file}: {_refusal(fields.refused, family)}")
    ours = (*names_of(family).values(), "rope_theta")
    values = {name: value for name, value in family.defaults.items() if name in ours} | fields.values
    try:
        config = family.config(**values)
        config = family.config(**{**values, **read_rope(raw, file, family, config.max_position_embeddings)})
    except ValidationError as error:
        problems = "; ".join(_problem(detail, family) for detail in error.errors(include_url=False))
        raise UserError(f"{file}: {problems}") from error
    if fields.notes:
        notes = ", ".join(shown(name) for name in fields.notes)
        _log_once(f"config.json: nothing reads {notes}; an export keeps what is there")
    if raw.get(CODE):
        _log_once(f"config.json: {CODE} is not followed: {family.architectures[0]} is computed by jaxllm's own code")
    return family, config


def _problem(detail: ErrorDetails, family: Family) -> str:
    name = ".".join(family.name(str(part)) for part in detail["loc"])
    return f"{name} = {shown(detail['input'])}: {requirement(detail)}" if name else requirement(detail)


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


def _refusal(refused: dict[str, Any], family: Family) -> str:
    ignored, sentences = ignored_of(family), []
    for name, value in refused.items():
        sentence = f"this version does not implement {shown(name)[1:-1]} = {shown(value)}"
        if name in ignored:
            values = ignored[name]
            allowed = "" if callable(values) else " or ".join(shown(value) for value in values)
            sentences.append(f"{sentence}{f', only {allowed}' if allowed else ''}.")
        else:
            meant = did_you_mean(name, names_of(family))
            sentences.append(f"{sentence}, which is no field of {family.architectures[0]} in transformers.{meant}")
    return " ".join((*sentences, "Remove a field only if you know that the model computes the same without it."))


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
        head = {"architectures": [family.architectures[0]], "model_type": family.model_type}
        del values["rope"]
        raw = {**head, **_renamed(values, family), **ids, "torch_dtype": dtype or "float32"}
        write_rope(raw, config)
        return raw
    raw: RawConfig = json.loads(json.dumps(source))
    before = parse_config(source)[1].model_dump(mode="json", exclude={"type"})
    changed = {name: value for name, value in values.items() if value != before[name]}
    own = {name: value for name, value in changed.items() if name not in ("rope", "rope_theta", PARTIAL)}
    raw.update(_renamed(own, family))
    # An original length that is not given is max_position_embeddings.
    lengthened = "max_position_embeddings" in changed and config.rope.type != "default"
    if "rope" in changed or PARTIAL in changed or lengthened:
        write_rope(raw, config)
    elif "rope_theta" in changed:
        write_theta(raw, config.rope_theta)
    raw.update(special_ids)
    if dtype is not None:
        for name in [name for name in ("dtype", "torch_dtype") if name in raw] or ["torch_dtype"]:
            raw[name] = dtype
    return raw


def _renamed(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """`values` by the names of `config.json`."""
    return {family.name(field): value for field, value in values.items()}
