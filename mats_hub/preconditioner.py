"""One Kronecker product near a sum of them, and its inverse as the preconditioner of conjugate gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mats_hub.closed_form import in_float64
from mats_hub.curvature import Identity, Kronecker
from mats_hub.errors import NumericalError
from mats_hub.linear_system import LinearSystem

Preconditioner = Callable[[Tensor], Tensor]


def nearest_kronecker(system: LinearSystem) -> Kronecker | None:
    """Return one Kronecker product near Σ Bᵢ ⊗ Aᵢ, or None when a term is no Kronecker product or all are zero.

    A multiple of the identity beside others is one, too.

    It is P_B ⊗ P_A with P_B = Σ Bᵢ tr(Aᵢ) / √t, P_A = Σ Aᵢ tr(Bᵢ) / √t and t = Σ tr(Bᵢ) tr(Aᵢ).

    Raises:
        NumericalError: a non-finite curvature, or one that is not positive semidefinite.

    """
    terms = [c for c in system.curvatures if isinstance(c, Kronecker)]
    for c in system.curvatures if terms else ():
        if isinstance(c, Identity):
            output, inner = (torch.eye(size).to(system.deltas[0]) for size in system.deltas[0].shape[-2:])
            terms.append(Kronecker(c.scale * output, inner))
    if len(terms) != len(system.curvatures):
        return None
    traces = [(_trace(c.output), _trace(c.input)) for c in terms]
    squared = reduce(add, (b * a for b, a in traces))  # a number, or one for each matrix of a stack
    if not torch.isfinite(squared).all() or (squared < 0).any():
        raise NumericalError("a curvature with a non-finite or negative trace: not positive semidefinite")
    if not squared.any():
        return None
    total = torch.where(squared > 0, squared, 1).sqrt()
    output = reduce(add, (c.output * (a / total)[..., None, None] for c, (_, a) in zip(terms, traces, strict=True)))
    inner = reduce(add, (c.input * (b / total)[..., None, None] for c, (b, _) in zip(terms, traces, strict=True)))
    return Kronecker(output, inner)


def kronecker_preconditioner(system: LinearSystem, damping: float = 1e-3) -> Preconditioner | None:
    """Return r ↦ P_B⁻¹ r P_A⁻¹ with the factors of `nearest_kronecker`, or None where there is none.

    Each factor is damped by `damping` times its mean diagonal, so that a rank-deficient sum can be factored, and by more where
    the curvatures were stored in a narrow dtype and rounding made one indefinite.

    Raises:
        NumericalError: a non-finite curvature, or one that is not positive semidefinite.

    """
    near = nearest_kronecker(system)
    if near is None:
        return None
    left, right = (_damped_cholesky(matrix, damping, system.accuracy) for matrix in (near.output, near.input))

    def apply(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, left).mT, right).mT

    return apply


def _damped_cholesky(matrix: Tensor, damping: float, accuracy: float = 0.0) -> Tensor:
    """Return L with L Lᵀ = matrix + `damping` · its mean diagonal · I.

    Rounding may have made a matrix indefinite that came with a larger rounding error, `accuracy`: it is damped more then, up
    to 100 times that error.
    """
    wide = in_float64(matrix)
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    mean = _trace(wide) / wide.shape[-1]
    while True:
        size = damping * mean
        factor, failed = torch.linalg.cholesky_ex(wide + torch.where(size == 0, 1, size)[..., None, None] * eye)
        if not failed.any():
            return factor.to(matrix)
        if damping >= 100 * accuracy:
            raise NumericalError("a curvature that is non-finite or not positive semidefinite")
        damping *= 10


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
