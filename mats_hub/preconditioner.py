"""One Kronecker product near a sum of them, and its inverse as the preconditioner of conjugate gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mats_hub.closed_form import in_float64
from mats_hub.curvature import Curvature, Diagonal, Gram, Identity, Kronecker, LowRank, as_factor, diagonal_of
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
            rows, columns = (system.deltas[0].new_ones(size) for size in system.deltas[0].shape[-2:])
            scale = c.scale.squeeze(-1) if isinstance(c.scale, Tensor) else c.scale
            terms.append(Kronecker(_diagonal(scale * rows), _diagonal(columns)))
    if len(terms) != len(system.curvatures):
        return None
    traces = [(diagonal_of(c.output).sum(-1), diagonal_of(c.input).sum(-1)) for c in terms]
    squared = reduce(add, (b * a for b, a in traces))  # a number, or one for each matrix of a stack
    if not torch.isfinite(squared).all() or (squared < 0).any():
        raise NumericalError("a curvature with a non-finite or negative trace: not positive semidefinite")
    if not squared.any():
        return None
    total = torch.where(squared > 0, squared, 1).sqrt()
    output = _weighted_sum([c.output for c in terms], [a / total for _, a in traces])
    inner = _weighted_sum([c.input for c in terms], [b / total for b, _ in traces])
    return Kronecker(output, inner)


def _diagonal(values: Tensor) -> LowRank:
    return LowRank(values.new_zeros(*values.shape, 0), values)


def _weighted_sum(matrices: Sequence[Tensor | LowRank], weights: Sequence[Tensor]) -> Tensor | LowRank:
    """Return Σ wᵢ Pᵢ, of sketches alone as a sketch where that pays."""
    terms: list[Curvature] = []
    for matrix, weight in zip(matrices, weights, strict=True):
        if isinstance(matrix, Tensor):
            terms.append(Gram(matrix * weight[..., None, None]))
        else:
            terms.append(LowRank(matrix.factor * weight.sqrt()[..., None, None], matrix.rest * weight[..., None]))
    total = reduce(add, terms)
    assert isinstance(total, Gram | LowRank)
    return as_factor(total)


def kronecker_preconditioner(system: LinearSystem, damping: float = 1e-3) -> Preconditioner | None:
    """Return r ↦ P_B⁻¹ r P_A⁻¹ with the factors of `nearest_kronecker`, or None where there is none.

    Of a diagonal system, as of embeddings and norms, it is the inverse itself, which leaves alone what no expert saw.

    Each factor is damped by `damping` times its mean diagonal, so that a rank-deficient sum can be factored, and by more where
    the curvatures were stored in a narrow dtype and rounding made one indefinite.

    Raises:
        NumericalError: a non-finite curvature, or one that is not positive semidefinite.

    """
    operator = system.operator
    if isinstance(operator, LowRank) and not operator.factor.shape[-1]:
        operator = Diagonal(operator.rest.unsqueeze(-2))
    if isinstance(operator, Diagonal):
        values = torch.where(operator.values > 0, operator.values, 1)
        return lambda residual: residual / values
    near = nearest_kronecker(system)
    if near is None:
        return None
    left, right = (_damped_inverse(matrix, damping, system.accuracy) for matrix in (near.output, near.input))
    return lambda residual: right(left(residual).mT).mT


def _damped_inverse(matrix: Tensor | LowRank, damping: float, accuracy: float) -> Callable[[Tensor], Tensor]:
    """Return R ↦ (P + `damping` · its mean diagonal · I)⁻¹ R."""
    if isinstance(matrix, Tensor):
        factor = _damped_cholesky(matrix, damping, accuracy)
        return lambda value: torch.cholesky_solve(value, factor)
    mean = diagonal_of(matrix).mean(-1, keepdim=True)
    rest = matrix.rest + torch.where(mean > 0, damping * mean, 1)
    # (D + F Fᵀ)⁻¹ = D^-½ H H D^-½ with H = (I + G Gᵀ)^-½ = I - W Wᵀ and G = D^-½ F. H is applied twice, and not its square
    # once, so that rounding cannot make it indefinite: of a large direction it leaves less than that.
    root = in_float64(rest).rsqrt().unsqueeze(-1)
    G = root * in_float64(matrix.factor)
    values, V = torch.linalg.eigh(G.mT @ G)
    sizes = (1 + values.clamp(min=0)).sqrt().unsqueeze(-2)
    W, root = (G @ (V / (sizes * (sizes + 1)).sqrt())).to(rest), root.to(rest)

    def apply(value: Tensor) -> Tensor:
        value = root * value
        for _ in range(2):
            value -= W @ (W.mT @ value)
        return root * value

    return apply


def _damped_cholesky(matrix: Tensor, damping: float, accuracy: float = 0.0) -> Tensor:
    """Return L with L Lᵀ = matrix + `damping` · its mean diagonal · I.

    Rounding may have made a matrix indefinite that came with a larger rounding error, `accuracy`: it is damped more then, up
    to 100 times that error.
    """
    wide = in_float64(matrix)
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    mean = diagonal_of(wide).mean(-1)
    while True:
        size = damping * mean
        factor, failed = torch.linalg.cholesky_ex(wide + torch.where(size == 0, 1, size)[..., None, None] * eye)
        if not failed.any():
            return factor.to(matrix)
        if damping >= 100 * accuracy:
            raise NumericalError("a curvature that is non-finite or not positive semidefinite")
        damping *= 10
