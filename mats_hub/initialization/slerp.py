"""Spherical linear interpolation (Shoemake 1985) between the weights of two experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context

PARALLEL = 0.9995
"""Beyond this cosine the arc is taken for a line."""


def slerp(deltas: Sequence[Tensor], weights: Sequence[float], context: Context) -> Tensor:
    """Return sin((1 − t) φ) / sin φ · θ₁ + sin(t φ) / sin φ · θ₂ − θ₀, in the deltas' shape.

    θᵢ = θ₀ + δᵢ are the weights (θ₀ is `context.origin`; 0 without it), φ the angle between them and t = w₂ / (w₁ + w₂).
    Weights that are nearly parallel, or zero, are interpolated linearly. One expert stays as it is.
    """
    if len(deltas) == 1:
        return deltas[0].clone()
    (first, second), t = deltas, weights[1] / sum(weights)
    origin = torch.zeros_like(first) if context.origin is None else context.origin
    precise = torch.promote_types(first.dtype, torch.float32)
    one, other = (origin + first).to(precise), (origin + second).to(precise)
    norms = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    cosine = (one * other).sum() / norms if norms > 0 else norms + 1
    if abs(cosine) > PARALLEL:
        return (1 - t) * first + t * second
    angle = torch.acos(cosine)
    a, b = torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)
    return (a * one + b * other - origin).to(first)
