"""KnOTS: merging in the basis that task vectors share (Stoica et al. 2024, https://arxiv.org/abs/2410.19735)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context
from mats_hub.initialization.matrices import on_matrices, svd
from mats_hub.initialization.ties import ties


def knots(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    context: Context,
    *,
    scale: float = 1.0,
    density: float = 0.2,
    fuse: str = "mean",
) -> Tensor:
    """Return U · TIES(S V₁ᵀ, …, S Vₙᵀ) with U S [V₁ᵀ … Vₙᵀ] = [δ₁ … δₙ] side by side, in the deltas' shape.

    TIES trims each of the aligned blocks to `density`. What is no matrix gets the average.
    """

    def merge(matrices: list[Tensor]) -> Tensor:
        U, S, Vh = svd(torch.cat(matrices, 1))
        blocks = (S[:, None] * Vh).split(matrices[0].shape[1], 1)
        return U @ ties(blocks, weights, Context(), scale=scale, density=density, fuse=fuse)

    return on_matrices(deltas, weights, context, merge)
