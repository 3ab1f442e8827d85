"""A config as YAML text: read into sections, and written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from jaxllm.core.config.messages import describe
from jaxllm.core.config.section import Section
from jaxllm.core.config.yaml_file import ConfigFile, use_core_schema
from jaxllm.core.errors import UserError

S = TypeVar("S", bound=Section)


def load(path: str | Path, overrides: Sequence[str], schema: type[S]) -> S:
    """The config in the YAML file `path`, changed by `overrides` (`"section.key=value"`), as a `schema`.

    Scalars follow the core schema of YAML 1.2: `1e-4` is a number, `yes` and `on` are text, dates are text.
    Values of overrides are YAML too. `evals.0.every=10` changes an item of a list; the index after the
    last adds one. Lists may fill tuples and text may fill paths, everything else is strict.

    Raises UserError listing every problem, one a line, each with the file and line (or `command line`) that
    set it and the nearest known key or value.
    """
    file = ConfigFile.read(Path(path))
    for override in overrides:
        file.override(override)
    try:
        return schema.model_validate_json(json.dumps(file.data))
    except ValidationError as error:
        raise UserError("\n".join(describe(error, schema, file))) from None


def dump(config: Section) -> str:
    """`config` with every default, as YAML in the order of the classes; `load` reads back an equal config."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or our loader would read as something else."""


def _text(dumper: Any, text: str) -> yaml.ScalarNode:
    # PyYAML folds the rarer line breaks (U+0085) into spaces unless they are escaped in double quotes.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


use_core_schema(_Dumper)
_Dumper.add_representer(str, _text)
