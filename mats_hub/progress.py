"""Showing how far a long loop is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]
"""Wraps an iterable, given its length and what is being done, and shows how far it is."""


def silent(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """Show nothing."""
    return items


def progress_bar(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """Show a bar with the time left on standard error, when that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=description, dynamic_ncols=True, disable=None)
