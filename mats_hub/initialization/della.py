"""DELLA: drop by magnitude, rescale, elect, fuse (Deep et al. 2024, https://arxiv.org/abs/2406.11617)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mats_hub.initialization.context import Context
from mats_hub.initialization.dare import DRAWS, drawn
from mats_hub.initialization.ties import elect


def della(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    scale: float = 0.5,
    density: float = 0.5,
    epsilon: float = 0.1,
    fuse: str = "sum",
) -> Tensor:
    """Return scale · fuse(elect(dropᵢ(δᵢ) / pᵢ)), in the deltas' shape.

    In each row of a tensor the probability p to be kept grows with the rank of an entry's magnitude, evenly from
    density − ε to density + ε (kept within (0, 1]); what is kept is divided by it. Draws are those of `dare`.
    """
    kept = []
    for delta, expert in zip(deltas, context.experts, strict=True):
        chance = (density - epsilon + 2 * epsilon * _standing(delta)).clamp(1e-3, 1)
        limit = (chance * DRAWS).round()
        stays = torch.as_tensor(np.less(drawn(delta, expert, context), limit.numpy()), device=delta.device)
        kept.append(torch.where(stays, delta / (limit / DRAWS).to(delta.device, delta.dtype), 0))
    return elect(kept, weights, fuse).mul_(scale)


def _standing(delta: Tensor) -> Tensor:
    """Return each entry's rank by magnitude within its row, from 0 for the smallest to 1, in float64 on the CPU."""
    if delta.dim() == 0 or delta.shape[-1] < 2:
        return torch.full(delta.shape, 0.5, dtype=torch.float64, device="cpu")
    order = delta.abs().argsort(dim=-1, stable=True)
    return order.argsort(dim=-1, stable=True).cpu().double() / (delta.shape[-1] - 1)
