"""DARE: drop and rescale (Yu et al. 2024, https://arxiv.org/abs/2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mats_hub.initialization.context import Context
from mats_hub.initialization.ties import elect

BLOCK = 2**19
"""Entries that are drawn by one generator."""

DRAWS = 2**16
"""Integers that a draw is one of: probabilities are whole multiples of its inverse."""


def dare(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    scale: float = 0.3,
    density: float = 0.5,
) -> Tensor:
    """Return scale · Σ wᵢ dropᵢ(δᵢ) / density, in the deltas' shape.

    Each entry of each expert is kept with probability `density`. The draw comes from a CPU generator seeded by
    (seed, expert's name, weight's name): the same on every device, in any order and after a resume.
    """
    merged = torch.zeros_like(deltas[0])
    for delta, weight, expert in zip(deltas, weights, context.experts, strict=True):
        merged.add_(_dropped(delta, expert, context, density), alpha=scale * weight)
    return merged


def dare_ties(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    scale: float = 0.5,
    density: float = 0.5,
    fuse: str = "sum",
) -> Tensor:
    """Return scale · (sum, or mean, of the dropped and rescaled δᵢ that have the elected sign), in the deltas' shape.

    Draws are those of `dare`, signs those of `ties`; nothing is trimmed besides.
    """
    kept = [_dropped(delta, expert, context, density) for delta, expert in zip(deltas, context.experts, strict=True)]
    return elect(kept, weights, fuse).mul_(scale)


def drawn(delta: Tensor, expert: str, context: Context) -> np.ndarray:
    """Return uniform integers in [0, `DRAWS`) of the delta's shape, of this seed, expert and weight.

    Each block of flat entries of the weight has a generator of its own, so that a part of it can be drawn alone. It is NumPy's
    SFC64, whose stream of raw integers stays the same in all versions; several times as fast as torch's.
    """
    start, stop = context.start, context.start + delta.numel()
    found = np.empty(delta.numel(), np.uint16)
    for begin in range(start - start % BLOCK, stop, BLOCK):
        digest = hashlib.sha256(f"{context.seed}\0{expert}\0{context.key}\0{begin}".encode()).digest()
        first, last = max(start, begin), min(stop, begin + BLOCK)
        block = np.random.SFC64(int.from_bytes(digest, "little")).random_raw(-(-(last - begin) // 4))
        found[first - start : last - start] = block.astype("<u8", copy=False).view("<u2")[first - begin : last - begin]
    return found.reshape(delta.shape)


def _dropped(delta: Tensor, expert: str, context: Context, density: float) -> Tensor:
    kept = max(1, round(density * DRAWS))
    # Compared by NumPy, and without a boolean of torch's: both are several times slower on a CPU.
    keep = np.less(drawn(delta, expert, context), kept).view(np.uint8)
    return rescaled(delta, torch.as_tensor(keep, device="cpu").to(delta.device, delta.dtype), kept / DRAWS)


def rescaled(delta: Tensor, keep: Tensor, density: float) -> Tensor:
    """Return `delta` where `keep` is 1, divided by `density` so that its expectation is unchanged, and 0 where it is 0."""
    return (delta / density).mul_(keep)
