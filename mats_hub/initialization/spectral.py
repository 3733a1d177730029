"""TSV-M, Iso-C and Iso-CTS: merging the singular directions of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.initialization.context import Context
from mats_hub.initialization.matrices import on_matrices, polar, svd, weighted_sum


def _largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = svd(matrix)
    return U[:, :count], S[:count], Vh[:count].mT


def tsvm(deltas: Sequence[Tensor], weights: Sequence[float], context: Context, *, scale: float = 1.0) -> Tensor:
    """Return scale · U⊥ diag(S) V⊥ᵀ, in the deltas' shape (TSV-M, Gargiulo et al. 2024, https://arxiv.org/abs/2412.00081).

    U, S and V hold the ⌊r / T⌋ largest singular triples of each of T task vectors, r the smaller side of the matrix, and ⊥
    stands for the polar factor. Triples beyond a task vector's numerical rank are left out. One task vector stays whole.
    """

    def merge(matrices: list[Tensor]) -> Tensor:
        count = min(matrices[0].shape) // len(matrices) or 1
        triples = [_largest(matrix * weight, count) for matrix, weight in zip(matrices, weights, strict=True)]
        U, S, V = (torch.cat(parts, -1) for parts in zip(*triples, strict=True))
        return scale * (polar(U) * S) @ polar(V).mT

    return on_matrices(deltas, weights, context, merge)


def iso_c(deltas: Sequence[Tensor], weights: Sequence[float], context: Context, *, scale: float = 1.0) -> Tensor:
    """Return scale · mean(S) U Vᵀ with U S Vᵀ = Σ wᵢ δᵢ, in the deltas' shape (Marczak et al. 2025, https://arxiv.org/abs/2502.04959).

    The mean is over the singular values up to the numerical rank.
    """

    def merge(matrices: list[Tensor]) -> Tensor:
        U, S, Vh = svd(weighted_sum(matrices, weights))
        return scale * S.mean() * U @ Vh if len(S) else torch.zeros_like(matrices[0])

    return on_matrices(deltas, weights, context, merge)


def iso_cts(
    deltas: Sequence[Tensor], weights: Sequence[float], context: Context, *, scale: float = 1.0, common: float = 0.8
) -> Tensor:
    """Return scale · s̄ U⊥ V⊥ᵀ, in the deltas' shape (Iso-CTS, Marczak et al. 2025, https://arxiv.org/abs/2502.04959).

    U and V hold the first `common` of the singular directions of Σ wᵢ δᵢ and, for each task, as many of the largest ones of
    what its task vector has outside of them as make up the rest; s̄ is the mean of all their singular values.
    """

    def merge(matrices: list[Tensor]) -> Tensor:
        U, S, Vh = svd(weighted_sum(matrices, weights))
        size = min(*matrices[0].shape, len(svd(torch.cat(matrices, 1))[1]))
        own = round((size - int(size * common)) / len(matrices))
        shared = min(size - own * len(matrices), len(S))
        U, S, V = U[:, :shared], S[:shared], Vh[:shared].mT
        parts = [(U, S, V)]
        for matrix, weight in zip(matrices, weights, strict=True):
            parts.append(_largest(weight * (matrix - U @ (U.mT @ matrix)), own))
        U, S, V = (torch.cat(held, -1) for held in zip(*parts, strict=True))
        return scale * S.mean() * polar(U) @ polar(V).mT if len(S) else torch.zeros_like(matrices[0])

    return on_matrices(deltas, weights, context, merge)
