"""What can go wrong, as one tree.

    MatsError
    ├── RecipeError            an option, name or combination that cannot be (also a ValueError)
    ├── SourceError            a model, a data set or a file cannot be found or opened
    │   ├── CheckpointError    ... is there, but is not a well-formed checkpoint or adapter
    │   └── WrongBytes         ... came with other bytes than the Hub has
    ├── IncompatibleExperts    experts (or an expert and the base) that cannot be merged with each other
    ├── StatisticsError        statistics cannot be measured or read
    │   └── StatisticsMismatch ... do not belong to the expert or do not cover it
    ├── PlanError              everything that stands in the way of a merge, in one list
    ├── NumericalError         a non-finite value or a curvature that is not positive semidefinite
    ├── OutputError            the output folder cannot be written
    ├── ResourceError          this machine has too little memory or disk for a merge
    └── HubError               a push that did not happen, or happened differently than asked

Every message names the thing, the two facts that clash and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MatsError(Exception):
    """Anything this package refuses to do, with the reason and the way out in its message."""


class RecipeError(MatsError, ValueError):
    """A recipe, an option or a name that cannot be."""


class SourceError(MatsError):
    """A model, a data set or a file that cannot be found or opened."""


class CheckpointError(SourceError):
    """A file that is there but is not a well-formed checkpoint or adapter."""


class WrongBytes(SourceError):
    """A file that came with other bytes than the Hub has, or than it had before."""


class IncompatibleExperts(MatsError):
    """Experts, or an expert and the base, that cannot be merged with each other."""


class StatisticsError(MatsError):
    """Statistics that cannot be measured or read."""


class StatisticsMismatch(StatisticsError):
    """Statistics that do not belong to the expert, or do not cover it."""


class NumericalError(MatsError):
    """A non-finite value, or a curvature that is not positive semidefinite.

    Attributes:
        position: of the system among those that are solved together.

    """

    def __init__(self, message: str, position: int = 0) -> None:
        super().__init__(message)
        self.position = position


class OutputError(MatsError):
    """An output folder that cannot be written."""


class ResourceError(MatsError):
    """Too little memory or disk on this machine for a merge."""


class HubError(MatsError):
    """A push that did not happen, or happened differently than asked."""


class PlanError(MatsError):
    """Everything that stands in the way of a merge.

    Attributes:
        problems: the errors, one for each thing that has to be mended.

    """

    def __init__(self, problems: Sequence[MatsError]) -> None:
        self.problems = tuple(problems)
        lines = [f"{type(problem).__name__}: {problem}" for problem in problems]
        count = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"this merge cannot be done ({count}):", *(f"  - {line}" for line in lines)]))


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Return the sentence for an unknown name: the nearest known one and the whole list."""
    choices = list(known)
    nearest = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown {what} {name!r}.{hint} Known: {', '.join(choices)}."
