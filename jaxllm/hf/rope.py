"""The rotary embedding in `config.json`: `rope_theta` and `rope_scaling` of transformers 4 (whose old key for the
kind is `type`), and `rope_parameters` of transformers 5."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from jaxllm.core.errors import UserError, did_you_mean
from jaxllm.nn.rope import ROPES, Rope

TABLES = ("rope_scaling", "rope_parameters")
# Keys that transformers finds beside the tables too, with the value that changes nothing; None = any does.
_OUTSIDE: Mapping[str, float | None] = {"original_max_position_embeddings": None, "partial_rotary_factor": 1.0}
FIELDS = ("rope_theta", *TABLES, *_OUTSIDE)
# Where the original length is not given, these have it in max_position_embeddings.
_ORIGINAL_BY_DEFAULT = ("yarn", "longrope")


def read_rope(raw: Mapping[str, Any], file: str | Path, max_positions: Any) -> dict[str, Any]:
    """`rope_theta` and `rope` of a family's config, those that `raw` sets.

    max_positions: the model's `max_position_embeddings`. Raises UserError naming `file`, key and value for a kind or
    a key that is unknown, a key that is missing, and for places that contradict each other.
    """
    tables = {name: _table(raw[name], name, file) for name in TABLES if raw.get(name)}
    thetas = {"rope_theta": raw.get("rope_theta")}
    thetas |= {f"{name}.rope_theta": table.pop("rope_theta", None) for name, table in tables.items()}
    outside = {key: raw[key] for key, neutral in _OUTSIDE.items() if raw.get(key) not in (None, neutral)}
    ropes = {name: _rope(table, name, outside, file, max_positions) for name, table in (tables or {"": {}}).items()}
    if len(set(ropes.values())) > 1:
        raise UserError(f"{file}: {' and '.join(ropes)} contradict each other; keep that of the training")
    theta = _agreed(thetas, file)
    return {"rope": next(iter(ropes.values())), **({} if theta is None else {"rope_theta": theta})}


def write_rope(raw: dict[str, Any], rope: Rope, theta: float) -> None:
    """Puts `rope` and its base into `raw`, in the form that it has; in that of transformers 4 if it has none."""
    values = {
        "rope_type": rope.type,
        **rope.model_dump(mode="json", exclude={"type"}, exclude_none=True),
    }
    if "rope_parameters" in raw:
        raw["rope_parameters"] = {**values, "rope_theta": theta}
    if "rope_scaling" in raw or "rope_parameters" not in raw:
        raw["rope_scaling"] = None if rope.type == "default" else values
    if "rope_theta" in raw or "rope_parameters" not in raw:
        raw["rope_theta"] = theta
    for key in _OUTSIDE:
        if key in raw:
            raw[key] = values.get(key)
    # transformers 4 looks for it there alone.
    if rope.type == "longrope":
        raw["original_max_position_embeddings"] = values["original_max_position_embeddings"]


def write_theta(raw: dict[str, Any], theta: float) -> None:
    """Changes the base wherever it stands in `raw`."""
    places = [raw, *(raw[name] for name in TABLES if isinstance(raw.get(name), dict))]
    for place in [place for place in places if place.get("rope_theta") is not None] or [raw]:
        place["rope_theta"] = theta


def _table(table: Any, name: str, file: str | Path) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UserError(f'{file}: {name} = {shown(table)} must be an object such as {{"rope_type": "default"}}')
    return {key: value for key, value in table.items() if value is not None}


def _rope(table: dict[str, Any], name: str, outside: Mapping[str, Any], file: str | Path, max_positions: Any) -> Rope:
    kinds = {f"{name}.{key}": table.pop(key) for key in ("rope_type", "type") if key in table}
    kind = _agreed(kinds, file) or "default"
    if not isinstance(kind, str) or kind not in ROPES:
        place = next(iter(kinds))
        raise UserError(
            f"{file}: {place} = {shown(kind)} is not implemented.{did_you_mean(str(kind), ROPES)} "
            f"Known: {', '.join(ROPES)}."
        )
    fields = ROPES[kind].model_fields
    values = {key: value for key, value in table.items() if key in fields or value != _OUTSIDE.get(key)}
    for key, value in outside.items():
        if key in fields:
            values[key] = _agreed({f"{name}.{key}": values.get(key), key: value}, file)
        elif _OUTSIDE[key] is not None:
            raise UserError(f"{file}: {key} = {shown(value)} has no meaning with the rope type {kind} of this model")
    if kind in _ORIGINAL_BY_DEFAULT:
        values.setdefault("original_max_position_embeddings", max_positions)
    try:
        return ROPES[kind].model_validate_json(json.dumps(values))
    except ValidationError as error:
        _refuse(error, kind, name, file)


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
            problems.append(f"{name}.{key} = {shown(detail['input'])}: {detail['msg']}")
    raise UserError(f"{file}: {'; '.join(problems)}") from error


def _agreed(values: Mapping[str, Any], file: str | Path) -> Any:
    """The one value in `values`, None left aside. Raises UserError if there are two: transformers 4 and 5 would take
    different ones."""
    given = {name: value for name, value in values.items() if value is not None}
    first = next(iter(given.values()), None)
    if any(value != first for value in given.values()):
        written = " and ".join(f"{name} = {shown(value)}" for name, value in given.items())
        raise UserError(f"{file}: {written} contradict each other; keep that of the training")
    return first


def shown(value: Any) -> str:
    """A value of a JSON file, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 100 else text[:97] + "…"
