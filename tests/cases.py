"""Which cases of a test belong to the default run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def crossed(rows: Iterable[Any], columns: Iterable[Any]) -> list[Any]:
    """Return all pairs as a test's parameters; those of neither the first row nor the first column are slow tests."""
    rows, columns = list(rows), list(columns)
    return [
        pytest.param(row, column, marks=() if row == rows[0] or column == columns[0] else pytest.mark.slow)
        for row in rows
        for column in columns
    ]
