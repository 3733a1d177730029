"""Questions with several answers to choose from: what the choices of an example are, and which of them is right."""

from __future__ import annotations

from string import ascii_uppercase
from typing import Any

from mats_hub.errors import StatisticsError
from mats_hub.statistics.dataset import Columns


def choices_of(columns: Columns, row: dict[str, Any]) -> list[str]:
    """Return the texts to choose from: of several columns, of a list in one, or of a table with their names as ARC's.

    Raises:
        StatisticsError: there are no two of them, or they are no texts.

    """
    held = [row[column] for column in columns.choices]
    if len(held) == 1:
        held = _named(columns, row).get("text") or held[0]
    if not isinstance(held, list) or len(held) < 2 or not all(isinstance(text, str) for text in held):
        raise StatisticsError(
            f"columns {', '.join(map(repr, columns.choices))} hold {str(held)[:60]!r} where two texts or more to choose from are "
            "to be; leave such examples out, or name other columns (--choices)"
        )
    return held


def right_choice(columns: Columns, row: dict[str, Any]) -> int:
    """Return the place of the right choice, which may be told by its place from 0 on, its name, its letter or its text.

    Raises:
        StatisticsError: none or several of the choices are meant.

    """
    texts, value = choices_of(columns, row), row[columns.label or ""]
    if isinstance(value, str):
        told = value.strip()
        several = columns.choices if len(columns.choices) > 1 else ()
        named = _named(columns, row).get("label") or [column[-1] for column in several]
        for known in (named, texts, ascii_uppercase[: len(texts)], [str(place) for place in range(len(texts))]):
            alike = [place for place, name in enumerate(known) if str(name).strip() == told]
            if len(alike) == 1:
                return alike[0]
    elif isinstance(value, int) and 0 <= value < len(texts):
        return int(value)
    raise StatisticsError(
        f"{value!r} in column {columns.label!r} tells none of {len(texts)} choices: it is to be a place from 0 to "
        f"{len(texts) - 1}, a letter, or the text itself"
    )


def right_answer(columns: Columns, row: dict[str, Any]) -> Any:
    """Return what is to be said: the right one of the choices where there are such, what the target's column holds otherwise."""
    return choices_of(columns, row)[right_choice(columns, row)] if columns.choices else row[columns.target or ""]


def _named(columns: Columns, row: dict[str, Any]) -> dict[str, list[str]]:
    """Return choices that have names, as two lists, from a table or a list of its rows."""
    held = row[columns.choices[0]]
    if isinstance(held, list) and held and all(isinstance(choice, dict) for choice in held):
        held = {name: [choice.get(name) for choice in held] for name in held[0]}
    return held if isinstance(held, dict) else {}
