"""What is wrong with data of a described type, in one line."""

from typing import Any

from pydantic import TypeAdapter, ValidationError


def problem_of(kind: TypeAdapter[Any], data: Any) -> str:
    """The first reason why ``data`` is not of a type; empty if it is."""
    try:
        kind.validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        if first["type"] == "missing":
            return f"{place} is missing"
        if first["type"] == "value_error":
            return f"{place}: {first['ctx']['error']}"
        if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            return f"{place} is no known key"
        found = repr(first["input"])
        found = found if len(found) <= 60 else f"{found[:60]}..."
        return f"{place} is {found}: {first['msg'][0].lower()}{first['msg'][1:]}"
    return ""
