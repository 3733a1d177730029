"""TIES-Merging: trim, elect sign, disjoint mean (Yadav et al. 2023, https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mats_hub.initialization.context import Context


def ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    scale: float = 1.0,
    density: float = 0.2,
    trim: str = "global",
    fuse: str = "mean",
) -> Tensor:
    """Return scale · (mean over the experts that agree with the elected sign), in the deltas' shape.

    1. Trim: of each expert keep the largest `density` of its entries by magnitude, over its whole task vector
       (`context.thresholds`, as in the paper) or, without them, over this weight alone.
    2. Elect: the sign of Σ wᵢ δᵢ per entry; a sum of exactly zero elects +.
    3. Merge: Σ wᵢ δᵢ / Σ wᵢ over the experts whose entry is kept and has the elected sign; with `fuse` ``sum``, Σ wᵢ δᵢ.

    `trim` says which of the two the recipe asks for; it acts through `context.thresholds`.
    """
    cuts = context.thresholds or tuple(_threshold(delta, density) for delta in deltas)
    return elect([trimmed(delta, cut) for delta, cut in zip(deltas, cuts, strict=True)], weights, fuse).mul_(scale)


def trimmed(delta: Tensor, cut: float) -> Tensor:
    """Return the entries whose magnitude is `cut` at least, and 0 for the others.

    Magnitudes are ranked and compared in float32: rounding must not put an entry under its own threshold.
    """
    if delta.dtype != torch.float32:
        return torch.where(delta.abs().float() >= cut, delta, 0)
    below = float(np.nextafter(np.float32(cut), np.float32(0)))
    return torch.nn.functional.hardshrink(delta, below)  # many times faster than `where`


def elect(deltas: Sequence[Tensor], weights: Sequence[float], fuse: str) -> Tensor:
    """Return, per entry, the weighted mean or sum of those deltas that are not zero and have the sign of Σ wᵢ δᵢ.

    The deltas are computed with in their place: what they hold afterwards means nothing.
    """
    # Arithmetic alone: choosing by a boolean is an order of magnitude slower on a CPU, where the signs are like dice.
    for delta, weight in zip(deltas, weights, strict=True):
        if weight != 1:
            delta *= weight
    total = deltas[0] + 0.0  # of −0, too, + is elected
    for delta in deltas[1:]:
        total += delta
    elected = torch.copysign(total.new_ones(()), total)
    mass: Tensor | None = None
    for number, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        agreeing = delta.mul_(elected).relu_()
        total = torch.add(total, agreeing, out=total) if number else total.copy_(agreeing)
        if fuse != "sum":
            signs = agreeing.sign_()
            mass = signs.mul_(abs(weight)) if mass is None else mass.add_(signs, alpha=abs(weight))
    if mass is not None:
        total /= mass.clamp_(min=min((abs(weight) for weight in weights if weight), default=1.0))
    return total.mul_(elected)


def kept_rank(count: int, density: float) -> int:
    """Return which smallest magnitude (1-based) is the first one kept of `count` entries; 1 keeps all.

    The rule of the authors' code, deterministic under equal magnitudes: entries at least as large as the
    (count − int(count · density))-th smallest stay.
    """
    return max(1, count - int(count * density))


def _threshold(delta: Tensor, density: float) -> float:
    if delta.numel() == 0:
        return 0.0
    return float(delta.abs().flatten().float().kthvalue(kept_rank(delta.numel(), density)).values)
