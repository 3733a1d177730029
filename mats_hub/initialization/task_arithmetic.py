"""Task Arithmetic (Ilharco et al. 2023, https://arxiv.org/abs/2212.04089)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mats_hub.initialization.context import Context


def task_arithmetic(
    deltas: Sequence[Tensor], weights: Sequence[float], context: Context, *, scale: float = 0.3
) -> Tensor:
    """Return scale · Σ wᵢ δᵢ (a sum, not a mean), in the deltas' shape."""
    merged = deltas[0] * (scale * weights[0])
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=scale * weight)
    return merged
