"""Words for what a value must be. Messages about YAML configs and about JSON files share them."""

from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from jaxllm.core.config.bounds import at_most

KINDS = {  # by pydantic's names; an error of type `int_type` means that an `int` was wanted
    "bool": "true or false",
    "dict": "a section of keys and values",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "a section of keys and values",
    "path": "a path",
    "str": "text",
    "string": "text",
    "tuple": "a list",
}


def kind_of(detail: ErrorDetails) -> str:
    """The name in KINDS of what was wanted, if the value is of another kind."""
    return detail["type"].removesuffix("_type").removesuffix("_attributes")


def requirement(*details: ErrorDetails) -> str:
    """What the value of all `details` must be: a field of several kinds (`int | str`) fails once for each."""
    sentences = list(dict.fromkeys(_requirement(detail) for detail in details))
    if len(sentences) > 1 and all(sentence.startswith("must be ") for sentence in sentences):
        return f"must be {' or '.join(sentence.removeprefix('must be ') for sentence in sentences)}"
    return "; ".join(sentences)


def _requirement(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return "required, but missing"
        case "value_error":
            return str(context["error"])
        case "less_than_equal":
            return f"must be {at_most(context['le'])}"
        case _ if kind_of(detail) in KINDS:
            return f"must be {KINDS[kind_of(detail)]}"
        case _:
            wanted = detail["msg"].partition(" should ")[2].replace(" after validation", "")
            return f"must {wanted}" if wanted else detail["msg"]


def first_problem(error: ValidationError) -> tuple[tuple[str | int, ...], Any, str]:
    """The place, the value and the requirement of the first value that is wrong."""
    first, *others = error.errors(include_url=False)
    same = [other for other in others if other["input"] is first["input"] and other["loc"][:1] == first["loc"][:1]]
    return first["loc"], first["input"], requirement(first, *same)
