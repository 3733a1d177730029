"""Masks of what each task uses of a merged task vector, and merging by them (Wang et al. 2024, https://arxiv.org/abs/2405.07813)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context
from mats_hub.initialization.task_arithmetic import task_arithmetic
from mats_hub.initialization.ties import ties


def multi_task_vector(
    deltas: Sequence[Tensor], weights: Sequence[float], context: Context, vector: str, density: float
) -> Tensor:
    """Return the merged task vector that masks are of: Σ wᵢ δᵢ, or the disjoint sum of TIES, in the deltas' shape."""
    if vector == "ties":
        return ties(deltas, weights, context, scale=1.0, density=density, fuse="sum")
    return task_arithmetic(deltas, weights, context, scale=1.0)


def task_mask(delta: Tensor, merged: Tensor, mask_scale: float) -> Tensor:
    """Return |δ| > λ |τ − δ|, boolean, in the delta's shape: the entries of the merged vector τ that the task uses."""
    return delta.abs() > mask_scale * (merged - delta).abs()


def consensus(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    vector: str = "task_arithmetic",
    scale: float = 0.3,
    density: float = 0.2,
    agreement: int = 2,
    mask_scale: Sequence[float] = (0.4,),
) -> Tensor:
    """Return scale · τ where at least `agreement` tasks use it, and 0 elsewhere, in the deltas' shape."""
    merged = multi_task_vector(deltas, weights, context, vector, density)
    scales = list(mask_scale) * len(deltas) if len(mask_scale) == 1 else list(mask_scale)
    masks = [task_mask(delta, merged, value) for delta, value in zip(deltas, scales, strict=True)]
    return scale * torch.where(torch.stack(masks).sum(0) >= agreement, merged, 0)
