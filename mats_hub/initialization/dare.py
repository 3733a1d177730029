"""DARE: drop and rescale (Yu et al. 2024, https://arxiv.org/abs/2311.03099)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context


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
        digest = hashlib.sha256(f"{context.seed}\0{expert}\0{context.key}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        # Not `bernoulli_`: with one probability for all entries it draws other numbers on processors with MKL's path.
        keep = torch.rand(delta.shape, generator=generator, dtype=torch.float64, device="cpu") < density
        merged.add_(rescaled(delta, keep.to(delta.device), density), alpha=scale * weight)
    return merged


def rescaled(delta: Tensor, keep: Tensor, density: float) -> Tensor:
    """Return `delta` where `keep` holds, divided by `density` so that its expectation is unchanged, and 0 elsewhere."""
    return torch.where(keep, delta / density, 0)
