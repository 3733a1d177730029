"""The linear system behind every merge: (Σ wᵢ Cᵢ) x = Σ wᵢ Cᵢ δᵢ (Tam, Bansal & Raffel 2024, equation 2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from mats_hub.curvature import Curvature, Identity, stack


@dataclass(frozen=True)
class LinearSystem:
    """The system A x = b of one weight, with A = Σ wᵢ Cᵢ and b = Σ wᵢ Cᵢ δᵢ.

    Attributes:
        curvatures: wᵢ Cᵢ, one per expert, in the experts' order.
        deltas: δᵢ, the experts' task vectors, each in the weight's shape.
        accuracy: relative rounding error that the curvatures came with, where it is larger than that of their dtype now;
            what lies below it is no curvature.

    """

    curvatures: tuple[Curvature, ...]
    deltas: tuple[Tensor, ...]
    accuracy: float = 0.0

    @property
    def eps(self) -> float:
        """Relative rounding error of a product: the spacing of the deltas' dtype, or of float32 for curvatures in it."""
        return max(min(self.accuracy, torch.finfo(torch.float32).eps), torch.finfo(self.deltas[0].dtype).eps)

    @cached_property
    def operator(self) -> Curvature:
        """A = Σ wᵢ Cᵢ, exact."""
        return reduce(add, self.curvatures)

    @cached_property
    def rhs(self) -> Tensor:
        """B = Σ wᵢ Cᵢ δᵢ."""
        return _sum(c.matvec(d) for c, d in zip(self.curvatures, self.deltas, strict=True))

    def damping(self, factor: float, shape: torch.Size) -> Identity:
        """Return the curvature `factor` · (mean diagonal of A) · I of a weight of this shape (Tikhonov, relative to A)."""
        return Identity(factor * float(self.operator.diagonal(shape).mean()))

    def residual(self, x: Tensor) -> Tensor:
        """Return b − A x, computed as Σ wᵢ Cᵢ (δᵢ − x).

        The two are the same in exact arithmetic; the second form is exactly zero where the experts agree with x, so
        that identical experts are a fixed point, and it loses no digits when x is near the experts.
        """
        return _sum(c.matvec(d - x) for c, d in zip(self.curvatures, self.deltas, strict=True))


def match(
    curvatures: Sequence[Curvature], deltas: Sequence[Tensor], weights: Sequence[float], accuracy: float = 0.0
) -> LinearSystem:
    """Return the system that matches the experts in the subspaces of their curvatures.

    Args:
        curvatures: Cᵢ of each expert at one weight.
        deltas: δᵢ of each expert at that weight, all of one shape.
        weights: wᵢ of each expert, not negative.
        accuracy: relative rounding error of the curvatures, where they were stored in a narrower dtype.

    Raises:
        ValueError: the three sequences differ in length, are empty, or the shapes differ.

    """
    if not len(curvatures) == len(deltas) == len(weights) > 0:
        raise ValueError(
            f"{len(curvatures)} curvatures, {len(deltas)} deltas and {len(weights)} weights: one of each per expert"
        )
    if len({delta.shape for delta in deltas}) > 1:
        raise ValueError(f"deltas of different shapes: {[tuple(delta.shape) for delta in deltas]}")
    scaled = tuple(c if w == 1 else c.scaled(w) for c, w in zip(curvatures, weights, strict=True))
    return LinearSystem(scaled, tuple(deltas), accuracy)


def together(systems: Sequence[LinearSystem]) -> LinearSystem | None:
    """Return several systems of one shape as one of stacked weights, or None where their curvatures do not stack."""
    columns = zip(*(system.curvatures for system in systems), strict=True)
    curvatures = [stack(column, systems[0].deltas[0]) for column in columns]
    found = tuple(curvature for curvature in curvatures if curvature is not None)
    if len(found) < len(curvatures):
        return None
    deltas = tuple(torch.stack(column) for column in zip(*(system.deltas for system in systems), strict=True))
    return LinearSystem(found, deltas, max(system.accuracy for system in systems))


def _sum(tensors) -> Tensor:  # type: ignore[no-untyped-def]
    return reduce(torch.add, tensors)
