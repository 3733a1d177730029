"""Curvatures of means of stored sums, as a recipe's options condition them: off-diagonal factor and normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from mats_hub.curvature import Dense, Diagonal, Gram, LowRank
from mats_hub.recipe import Curvature as CurvatureOptions


def conditioned_gram(matrix: Tensor, options: CurvatureOptions) -> Gram:
    """Return the curvature of a Gram ``[d, d]`` with the recipe's off-diagonal factor and normalization."""
    return Gram(_normalized(_off_diagonal(matrix, options.off_diagonal), options.normalization))


def conditioned_block(matrix: Tensor, options: CurvatureOptions) -> Dense:
    """Return the curvature of a whole block ``[n, n]`` (of n entries of a parameter), conditioned in the same way."""
    return Dense(_normalized(_off_diagonal(matrix, options.off_diagonal), options.normalization))


def conditioned_sketch(curvature: LowRank, options: CurvatureOptions) -> LowRank:
    """Return a sketched Gram with the recipe's off-diagonal factor and normalization, as `conditioned_gram` does."""
    seen = curvature.factor.square().sum(1)
    rest = curvature.rest + (1 - options.off_diagonal) * seen
    changed = LowRank(curvature.factor * options.off_diagonal**0.5, rest)
    seen = changed.factor.square().sum(1)
    gram = changed.factor.T @ changed.factor
    frobenius = float(gram.square().sum() + 2 * (seen * rest).sum() + rest.square().sum()) ** 0.5
    size = {"none": 1.0, "trace": float((seen + rest).mean()), "frobenius": frobenius}[options.normalization]
    return changed.scaled(1 / size) if size > 0 else changed


def _off_diagonal(matrix: Tensor, factor: float) -> Tensor:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    return matrix if factor == 1 else matrix * factor + torch.diag_embed(diagonal * (1 - factor))


def _normalized(matrix: Tensor, how: str) -> Tensor:
    size = {"none": 1.0, "trace": float(matrix.diagonal(dim1=-2, dim2=-1).mean()), "frobenius": float(matrix.norm())}[
        how
    ]
    return matrix / size if size > 0 else matrix


def normalized_diagonal(values: Tensor, how: str) -> Diagonal:
    """Return the curvature of a diagonal, of any shape, with the recipe's normalization."""
    size = {"none": 1.0, "trace": float(values.mean()), "frobenius": float(values.norm())}[how]
    return Diagonal(values / size if size > 0 else values)
