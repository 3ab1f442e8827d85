"""The rotary embedding in `config.json`: `rope_theta` and `rope_scaling` of transformers 4 (whose old key for the
kind is `type`), and `rope_parameters` of transformers 5."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from jaxllm.core.config.requirement import requirement
from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.models.family import Family, FamilyConfig
from jaxllm.nn.rope import ROPES, Rope

TABLES = ("rope_scaling", "rope_parameters")
PARTIAL, ORIGINAL = "partial_rotary_factor", "original_max_position_embeddings"
# Keys that transformers finds beside the tables too, with the value that changes nothing; None = any does.
_OUTSIDE: Mapping[str, float | None] = {ORIGINAL: None, PARTIAL: 1.0}
FIELDS = ("rope_theta", *TABLES, *_OUTSIDE)
# Keys that no code of transformers reads: what YaRN's first models say of their training.
_INERT = ("finetuned",)
# Where the original length is not given, these have it in max_position_embeddings.
_ORIGINAL_BY_DEFAULT = ("yarn", "longrope")


def read_rope(raw: Mapping[str, Any], file: str | Path, family: Family, max_positions: int) -> dict[str, Any]:
    """`rope`, `rope_theta` and `partial_rotary_factor` of a config of `family`, those that it has and `raw` sets.

    max_positions: the model's `max_position_embeddings`. Raises UserError naming `file`, key and value for a kind or
    a key that is unknown, a key that is missing, and for places that contradict each other.
    """
    tables = {name: _table(raw[name], name, file) for name in TABLES if raw.get(name)}
    thetas = {"rope_theta": raw.get("rope_theta")}
    thetas |= {f"{name}.rope_theta": table.pop("rope_theta", None) for name, table in tables.items()}
    values = {"rope_theta": _agreed(thetas, file)}
    kinds = {name: _kind(table, name, family, file) for name, table in (tables or {"": {}}).items()}
    of_kind = any(PARTIAL in ROPES[kind].model_fields for kind in kinds.values())
    if PARTIAL in family.config.model_fields and not of_kind:
        shares = {f"{name}.{PARTIAL}": table.pop(PARTIAL, None) for name, table in tables.items()}
        values[PARTIAL] = _agreed({**shares, PARTIAL: raw.get(PARTIAL)}, file)
    outside = {key: raw.get(key, family.defaults.get(key)) for key in _OUTSIDE if key not in values}
    outside = {key: value for key, value in outside.items() if value not in (None, _OUTSIDE[key])}
    ropes = {
        name: _rope(tables.get(name, {}), kind, name, outside, file, max_positions) for name, kind in kinds.items()
    }
    if len(set(ropes.values())) > 1:
        raise UserError(f"{file}: {' and '.join(ropes)} contradict each other; keep that of the training")
    values["rope"] = next(iter(ropes.values()))
    return {name: value for name, value in values.items() if value is not None}


def write_rope(raw: dict[str, Any], config: FamilyConfig) -> None:
    """Puts the rotary embedding of `config` into `raw`, in the form that `raw` has; if it has none, in the form of
    transformers 4."""
    rope, theta = config.rope, config.rope_theta
    values = {"rope_type": rope.type, **rope.model_dump(mode="json", exclude={"type"}, exclude_none=True)}
    share = getattr(config, PARTIAL, None)
    if "rope_parameters" in raw:
        raw["rope_parameters"] = {**values, **({} if share is None else {PARTIAL: share}), "rope_theta": theta}
    if "rope_scaling" in raw or "rope_parameters" not in raw:
        raw["rope_scaling"] = None if rope.type == "default" else values
    if "rope_theta" in raw or "rope_parameters" not in raw:
        raw["rope_theta"] = theta
    for key in _OUTSIDE:
        if key in raw:
            raw[key] = values.get(key, getattr(config, key, None))
    if "rope_parameters" not in raw and share not in (None, 1.0):
        raw[PARTIAL] = share
    # transformers 4 looks for it there alone.
    if rope.type == "longrope":
        raw[ORIGINAL] = values[ORIGINAL]


def write_theta(raw: dict[str, Any], theta: float) -> None:
    """Changes the base wherever it stands in `raw`."""
    places = [raw, *(raw[name] for name in TABLES if isinstance(raw.get(name), dict))]
    for place in [place for place in places if place.get("rope_theta") is not None] or [raw]:
        place["rope_theta"] = theta


def _table(table: Any, name: str, file: str | Path) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UserError(f'{file}: {name} = {shown(table)} must be an object such as {{"rope_type": "default"}}')
    return {key: value for key, value in table.items() if value is not None}


def _kind(table: dict[str, Any], name: str, family: Family, file: str | Path) -> str:
    """The kind of rope that `table` names, which is taken out of it."""
    kinds = {f"{name}.{key}": table.pop(key) for key in ("rope_type", "type") if key in table}
    kind = _agreed(kinds, file) or "default"
    if isinstance(kind, str):
        kind = family.rope_names.get(kind, kind)
    if not isinstance(kind, str) or kind not in ROPES:
        place = next(iter(kinds))
        raise UserError(
            f"{file}: {place} = {shown(kind)} is not implemented.{did_you_mean(str(kind), ROPES)} "
            f"Known: {', '.join(ROPES)}."
        )
    return kind


def _rope(
    table: dict[str, Any], kind: str, name: str, outside: Mapping[str, Any], file: str | Path, max_positions: int
) -> Rope:
    fields = ROPES[kind].model_fields
    values = {key: value for key, value in table.items() if key in fields or not _is_inert(key, value)}
    for key, value in outside.items():
        if key in fields:
            values[key] = _agreed({f"{name}.{key}": values.get(key), key: value}, file)
        elif _OUTSIDE[key] is not None:
            raise UserError(f"{file}: {key} = {shown(value)} has no meaning with the rope type {kind} of this model")
    if kind in _ORIGINAL_BY_DEFAULT:
        values.setdefault(ORIGINAL, max_positions)
    try:
        return ROPES[kind].model_validate(values)
    except ValidationError as error:
        _refuse(error, kind, name, file)


def _is_inert(key: str, value: Any) -> bool:
    return key in _INERT or (key in _OUTSIDE and value == _OUTSIDE[key])


def _refuse(error: ValidationError, kind: str, name: str, file: str | Path) -> NoReturn:
    problems: list[str] = []
    for detail in error.errors(include_url=False):
        key = ".".join(str(part) for part in detail["loc"])
        known = [field for field in ROPES[kind].model_fields if field != "type"]
        if detail["type"] == "missing":
            problems.append(f"{name} lacks {key}, which the rope type {kind} needs")
        elif detail["type"] == "extra_forbidden":
            keys = f"Its keys: {', '.join(known)}." if known else "It has no keys but rope_theta."
            problems.append(
                f"{name}.{key} = {shown(detail['input'])} is unknown for the rope type {kind}."
                f"{did_you_mean(key, known)} {keys}"
            )
        else:
            problems.append(f"{name}.{key} = {shown(detail['input'])}: {requirement(detail)}")
    raise UserError(f"{file}: {'; '.join(problems)}") from error


def _agreed(values: Mapping[str, Any], file: str | Path) -> Any:
    """The one value in `values`, None left aside. Raises UserError if there are two: transformers 4 and 5 would take
    different ones."""
    given = {name: value for name, value in values.items() if value is not None}
    first, *others = given.values() or [None]
    if any(value != first for value in others):
        written = " and ".join(f"{name} = {shown(value)}" for name, value in given.items())
        raise UserError(f"{file}: {written} contradict each other; keep that of the training")
    return first


def shown(value: Any) -> str:
    """A value of a JSON file, for a message. Halves of surrogate pairs, which cannot be printed, are escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace").decode()
    return text if len(text) <= 100 else text[:97] + "…"
