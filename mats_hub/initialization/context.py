"""Where an initialization is applied: what it may depend on beside the task vectors themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """The place of one weight in a merge.

    Attributes:
        key: the weight's name.
        experts: the experts' names, in order; random draws depend on the name, not on the position.
        seed: the recipe's seed.
        start: where in the weight the task vectors begin, where they are flat entries of a part of it.
        thresholds: for each expert the magnitude below which an entry of the whole task vector is trimmed, when the
            initialization trims globally; None lets it trim this weight alone.
        origin: the weight that the task vectors start from.
        transposed: whether the weight is stored ``[in, out]``.
        stacked: whether it stacks the matrices of several experts along its first dimension.

    """

    key: str = ""
    experts: tuple[str, ...] = ()
    seed: int = 0
    start: int = 0
    thresholds: tuple[float, ...] | None = None
    origin: Tensor | None = None
    transposed: bool = False
    stacked: bool = False
