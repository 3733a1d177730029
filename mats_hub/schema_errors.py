"""What pydantic finds wrong with a recipe or a file of tasks, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from mats_hub.errors import unknown

PartAt = Callable[[Sequence[str]], type[BaseModel]]


def explain(error: ValidationError, part_at: PartAt, tags: Collection[str] = ()) -> str:
    """Return sentences that name the key, the value and what would be accepted.

    Args:
        error: what was found.
        part_at: steps to a place → the schema's class there.
        tags: steps that stand for a choice of classes, and not for a key.

    """
    found: list[Any] = list(error.errors())
    if len(found) > 1:  # a list with a bad entry is also reported as too short
        found = [details for details in found if details["type"] != "too_short"]
    return "; ".join(_sentence(details, part_at, tags) for details in found)


def _sentence(details: dict[str, Any], part_at: PartAt, tags: Collection[str]) -> str:
    place = [str(step) for step in details["loc"]]
    where = ".".join(step for step in place if step not in tags)
    if details["type"] == "extra_forbidden":
        return f"{where}: {unknown('key', place[-1], part_at(place[:-1]).model_fields)}"
    if details["type"] == "union_tag_invalid":
        return f"{where}: {unknown(place[-1], details['ctx'].get('tag'), tags)}"
    if details["type"] == "literal_error":
        known = [part.strip(" '") for part in details["ctx"]["expected"].replace(" or ", ",").split(",")]
        return f"{where}: {unknown('value', details['input'], known)}"
    if details["type"] == "missing":
        return f"{where} is missing"
    message = details["msg"].removeprefix("Value error, ")
    shown = "" if details["type"] == "value_error" else f" (it is {str(details['input'])[:80]!r})"
    return f"{where}: {message}{shown}" if where else f"{message}{shown}"
