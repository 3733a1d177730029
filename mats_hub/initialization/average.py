"""Average of the experts (Wortsman et al. 2022, https://arxiv.org/abs/2203.05482)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mats_hub.initialization.context import Context


def average(deltas: Sequence[Tensor], weights: Sequence[float], context: Context) -> Tensor:
    """Return Σ wᵢ δᵢ / Σ wᵢ, in the deltas' shape."""
    total = sum(weights)
    merged = deltas[0] * (weights[0] / total)
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        merged.add_(delta, alpha=weight / total)
    return merged
