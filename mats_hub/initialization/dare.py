"""DARE: drop and rescale (Yu et al. 2024, https://arxiv.org/abs/2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context
from mats_hub.initialization.ties import elect


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
    return scale * elect(kept, weights, fuse)


def drawn(delta: Tensor, expert: str, context: Context) -> Tensor:
    """Return uniform numbers in [0, 1) of the delta's shape, in float64 on the CPU, of this seed, expert and weight."""
    digest = hashlib.sha256(f"{context.seed}\0{expert}\0{context.key}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    # Not `bernoulli_`: with one probability for all entries it draws other numbers on processors with MKL's path.
    return torch.rand(delta.shape, generator=generator, dtype=torch.float64, device="cpu")


def _dropped(delta: Tensor, expert: str, context: Context, density: float) -> Tensor:
    return rescaled(delta, (drawn(delta, expert, context) < density).to(delta.device), density)


def rescaled(delta: Tensor, keep: Tensor, density: float) -> Tensor:
    """Return `delta` where `keep` holds, divided by `density` so that its expectation is unchanged, and 0 elsewhere."""
    return torch.where(keep, delta / density, 0)
