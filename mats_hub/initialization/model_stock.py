"""Model Stock (Jang et al. 2024, https://arxiv.org/abs/2403.19522)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from mats_hub.initialization.average import average
from mats_hub.initialization.context import Context


def model_stock(deltas: Sequence[Tensor], weights: Sequence[float], context: Context) -> Tensor:
    """Return t · mean(δ) with t = N cos θ / (1 + (N − 1) cos θ), in the deltas' shape.

    cos θ is the mean over all pairs of experts of the cosine between their task vectors at this weight; t is kept within
    [0, 1], and one expert stays as it is.
    """
    mean = average(deltas, weights, context)
    if len(deltas) == 1:
        return mean
    flat = [delta.flatten() for delta in deltas]
    norms = [torch.linalg.vector_norm(delta) for delta in flat]
    pairs = [
        float(a @ b / (m * n)) if m > 0 and n > 0 else 0.0
        for (a, m), (b, n) in combinations(zip(flat, norms, strict=True), 2)
    ]
    cosine = sum(pairs) / len(pairs)
    below = 1 + (len(deltas) - 1) * cosine
    ratio = len(deltas) * cosine / below if below > 0 else 0.0
    return mean * min(1.0, max(0.0, ratio))
