"""Where an initialization is applied: what it may depend on beside the task vectors themselves."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """The place of one weight in a merge.

    Attributes:
        key: the weight's name.
        experts: the experts' names, in order; random draws depend on the name, not on the position.
        seed: the recipe's seed.
        thresholds: for each expert the magnitude below which an entry of the whole task vector is trimmed, when the
            initialization trims globally; None lets it trim this weight alone.

    """

    key: str = ""
    experts: tuple[str, ...] = ()
    seed: int = 0
    thresholds: tuple[float, ...] | None = None
