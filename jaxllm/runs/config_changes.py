"""What has changed in a config when a run is resumed, and whether it may, as the mark of each key says."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxllm.core.config import OnResume
from jaxllm.core.config.on_resume import marks
from jaxllm.core.errors import UserError
from jaxllm.runs.config import Config


class Change(NamedTuple):
    """A key with its value in the run's own config and in the one that is to go on, and its mark."""

    key: str
    there: Any
    now: Any
    mark: OnResume

    def __str__(self) -> str:
        return f"{self.key} (there: {_short(self.there)}, now: {_short(self.now)})"


def changes(there: Config, now: Config) -> list[Change]:
    """Every key that differs, in the order of the config."""
    before, after = (values_of(config) for config in (there, now))
    both = {key: (before.get(key), after.get(key)) for key in (*before, *after)}
    sections = {key[:end] for key in both for end, character in enumerate(key) if character == "."}
    known = {**dict(marks(there)), **dict(marks(now))}
    return [
        Change(key, *values, mark_of(key, known))
        for key, values in both.items()
        if values[0] != values[1] and key not in sections
    ]


def mark_of(key: str, known: Mapping[str, OnResume]) -> OnResume:
    """The mark of a key: its own, or that of what it is in, such as of `train.xla` for `train.xla.xla_flag`."""
    while key not in known:
        key = key.rpartition(".")[0]
    return known[key]


def harmless(
    found: Iterable[Change], refused: Iterable[OnResume], run: str, resolved: str, *, also: Sequence[str] = ()
) -> list[Change]:
    """Those of the changes that are to be said.

    refused: the marks of the keys whose change is wrong input. also: keys whose change is, whatever their marks. Raises
    UserError if there is one. run, resolved: names for its message.
    """
    found, refused = list(found), [*refused]
    wrong = [str(change) for change in found if change.mark in refused or change.key in also]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{run} holds a run with another config: {'; '.join(wrong[:5])}{more}. Choose another output_dir, or go "
            f"on with the run's own settings ({resolved}); model.path={run} starts a new run from its weights"
        )
    return [change for change in found if change.mark is not OnResume.FREE]


def values_of(config: Config) -> dict[str, Any]:
    """`{"data.sources.0.path": value}` of a config."""
    return _values(config.model_dump(mode="json"))


def _values(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, list):
        config = dict(enumerate(config))
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    parts = (_values(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in config.items())
    return {key: value for part in parts for key, value in part.items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "…"
