"""What may change in a config when a run goes on."""

import re
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, NamedTuple

from jaxllm.core.errors import UserError
from jaxllm.runs.config import Config


class Rule(Enum):
    """What becomes of a key that has changed."""

    REFUSED = "the state, or the order of the data, means something else"
    NEW_FOLDER = "it trains in another way: refused, but for a new run that goes on from another's checkpoint"
    SAID = "the training is the same, but for rounding"
    FREE = "where the run is, where it goes on from, and how its processes wait for one another"


# Every key of the config, or the section that it is in; the longest name counts. `*` is any item of a list.
RULES = {
    "output_dir": Rule.FREE,
    "seed": Rule.REFUSED,
    "model": Rule.REFUSED,
    "data": Rule.REFUSED,
    "data.sources.*.path": Rule.SAID,  # what the files hold is compared
    "data.sources.*.chat_template": Rule.SAID,  # likewise
    "mesh": Rule.SAID,
    "peft": Rule.REFUSED,
    "optim": Rule.NEW_FOLDER,
    "optim.type": Rule.REFUSED,
    "train.steps": Rule.SAID,
    "train.epochs": Rule.SAID,
    "train.batch_size": Rule.NEW_FOLDER,
    "train.micro_batch_size": Rule.SAID,
    "train.update": Rule.SAID,
    "train.reduce": Rule.SAID,
    "train.reduce_dtype": Rule.SAID,
    "train.shard_optimizer": Rule.SAID,
    "train.offload_optimizer": Rule.SAID,
    "train.remat": Rule.SAID,
    "train.virtual_stages": Rule.SAID,
    "train.param_dtype": Rule.REFUSED,
    "train.compute_dtype": Rule.SAID,
    "train.max_grad_norm": Rule.NEW_FOLDER,
    "train.max_grad_value": Rule.NEW_FOLDER,
    "train.max_bad_steps": Rule.SAID,
    "train.label_smoothing": Rule.NEW_FOLDER,
    "train.z_loss": Rule.NEW_FOLDER,
    "train.dropout": Rule.NEW_FOLDER,
    "train.stochastic_rounding": Rule.NEW_FOLDER,
    "train.unroll": Rule.SAID,
    "train.attention": Rule.SAID,
    "train.deterministic": Rule.SAID,
    "train.xla": Rule.SAID,
    "distributed": Rule.FREE,
    "checkpoint": Rule.SAID,
    "checkpoint.resume": Rule.FREE,
    "evals": Rule.SAID,
    "metrics": Rule.SAID,
    "callbacks": Rule.SAID,
}


def rule_of(key: str) -> Rule:
    """The rule of a key such as `data.sources.0.path`. Raises KeyError for one that the table lacks."""
    name = re.sub(r"\.\d+(?=\.|$)", ".*", key)
    while name not in RULES and "." in name:
        name = name.rpartition(".")[0]
    return RULES[name]


class Change(NamedTuple):
    """A key with its value in the run's own config and in the one that is to go on."""

    key: str
    there: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} (there: {_short(self.there)}, now: {_short(self.now)})"


def changes(there: Config, now: Config) -> list[Change]:
    """Every key that differs, in the order of the config."""
    before, after = (values_of(config) for config in (there, now))
    both = {key: (before.get(key), after.get(key)) for key in (*before, *after)}
    sections = {key[:end] for key in both for end, mark in enumerate(key) if mark == "."}
    return [Change(key, *values) for key, values in both.items() if values[0] != values[1] and key not in sections]


def harmless(
    found: Iterable[Change], refused: Iterable[Rule], run: str, resolved: str, *, also: Sequence[str] = ()
) -> list[Change]:
    """Those of the changes that are to be said.

    refused: the rules under which a change is wrong input, and also: keys whose change is. Raises UserError if there
    is one. run, resolved: names for its message.
    """
    found, refused = list(found), [*refused]
    wrong = [str(change) for change in found if rule_of(change.key) in refused or change.key in also]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"{run} holds a run with another config: {'; '.join(wrong[:5])}{more}. Choose another output_dir, or go "
            f"on with the run's own settings ({resolved}); model.path={run} starts a new run from its weights"
        )
    return [change for change in found if rule_of(change.key) is not Rule.FREE]


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
