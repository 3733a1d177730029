"""Model Breadcrumbs (Davari & Belilovsky 2023, https://arxiv.org/abs/2312.06795)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context


def breadcrumbs(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    scale: float = 0.3,
    density: float = 0.9,
    outliers: float = 0.01,
) -> Tensor:
    """Return scale · Σ wᵢ maskᵢ(δᵢ), in the deltas' shape.

    Of each tensor the ⌊n · outliers⌋ largest entries by magnitude are left out, and so many of the smallest that
    ⌊n · density⌋ stay (all that are left, if that is fewer; equal magnitudes stay together).
    """
    merged = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        merged.add_(torch.where(_kept(delta, density, outliers), delta, 0), alpha=scale * weight)
    return merged


def _kept(delta: Tensor, density: float, outliers: float) -> Tensor:
    sizes, count = delta.abs().float(), delta.numel()
    if not count:
        return sizes > 0
    largest = count - int(count * outliers)
    smallest = min(max(1, largest - int(count * density) + 1), largest)
    flat = sizes.flatten()
    return (sizes >= flat.kthvalue(smallest).values) & (sizes <= flat.kthvalue(largest).values)
