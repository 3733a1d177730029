"""Closed forms of A z = r: what `mats_hub.solver.exact` solves by factorizations instead of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mats_hub.curvature import Curvature, Dense, Diagonal, Gram, Identity, Kronecker, LowRank, Sum, written_out
from mats_hub.errors import NumericalError
from mats_hub.linear_system import LinearSystem

Accuracy = tuple[float, float]
"""`LinearSystem.eps` and `LinearSystem.accuracy`."""


def has_closed_form(kinds: Sequence[type]) -> bool:
    """Tell whether `exact` solves a system of curvatures of these classes, one per expert."""
    simple = (
        set(kinds) <= {Identity, Diagonal} or set(kinds) <= {Identity, Gram, LowRank} or set(kinds) <= {Identity, Dense}
    )
    return simple or (set(kinds) == {Kronecker} and len(kinds) <= 2)


def closed_form(system: LinearSystem, r: Tensor) -> Tensor:
    """Return z with A z = r, of r's shape and with no component in the null space of A.

    Raises:
        NumericalError: a curvature that is not positive semidefinite.
        ValueError: the system has no closed form.

    """
    operator, accuracy = system.operator, (system.eps, system.accuracy)
    if isinstance(operator, Identity):
        scale = float(operator.scale)
        _refuse_negative(scale, scale)
        return r / scale if scale else torch.zeros_like(r)
    if isinstance(operator, Diagonal):
        return _closed_form_of_diagonal(operator.values, r)
    if isinstance(operator, LowRank):
        if not operator.factor.shape[1]:
            return _closed_form_of_diagonal(operator.rest, r)
        operator = operator.dense()
    if isinstance(operator, Gram):
        return _solve_symmetric(operator.matrix, r.mT, accuracy).mT
    if isinstance(operator, Dense):
        return _solve_symmetric(operator.matrix, r.reshape(-1, 1), accuracy).reshape(r.shape)
    if isinstance(operator, Kronecker):
        output, inner = written_out(operator.output), written_out(operator.input)
        return _solve_symmetric(inner, _solve_symmetric(output, r, accuracy).mT, accuracy).mT
    rows = _rows_and_columns(operator)
    if rows is not None:
        return _solve_rows_and_columns(*rows, r, accuracy)
    pair = [c for c in system.curvatures if isinstance(c, Kronecker)]
    if len(pair) == len(system.curvatures) == 2:
        outputs, inputs = [written_out(c.output) for c in pair], [written_out(c.input) for c in pair]
        if r.dim() == 2:
            return _two_kronecker(outputs, inputs, r, accuracy)
        stacks = zip(zip(*outputs, strict=True), zip(*inputs, strict=True), r, strict=True)
        return torch.stack([_two_kronecker(B, A, one, accuracy) for B, A, one in stacks])
    kinds = ", ".join(type(c).__name__ for c in system.curvatures)
    raise ValueError(
        f"no closed form for {len(system.curvatures)} experts with curvatures {kinds}: use conjugate gradient"
    )


def _closed_form_of_diagonal(values: Tensor, r: Tensor) -> Tensor:
    if values.numel():
        _refuse_negative(float(values.min()), float(values.abs().max()))
    seen = values > 0
    return torch.where(seen, r / torch.where(seen, values, 1), 0)


def _rows_and_columns(operator: Curvature) -> tuple[Tensor, Tensor] | None:
    """Return (c, A) of an operator V ↦ diag(c) V + V A, a weight looked up by rows and multiplied by, too; else None."""
    terms = operator.terms if isinstance(operator, Sum) else ()
    diagonals = [term.values for term in terms if isinstance(term, Diagonal) and term.values.shape[-1] == 1]
    grams = [term.matrix for term in terms if isinstance(term, Gram)]
    return (diagonals[0], grams[0]) if len(diagonals) == len(grams) == 1 and len(terms) == 2 else None


def _solve_rows_and_columns(c: Tensor, A: Tensor, r: Tensor, accuracy: Accuracy) -> Tensor:
    """Solve diag(c) Z + Z A = r along the eigenvectors of A = Q diag(λ) Qᵀ, entry by entry: (cᵢ + λⱼ) (Z Q)ᵢⱼ = (r Q)ᵢⱼ."""
    values, vectors = _eigh(A, accuracy)
    total = in_float64(c) + values.clamp(min=0)
    seen = total > _cutoff(len(A), accuracy) * values[-1].clamp(min=0)  # c is as accurate as it is large
    return torch.where(seen, (in_float64(r) @ vectors) / torch.where(seen, total, 1), 0) @ vectors.T


def _cutoff(size: int, accuracy: Accuracy) -> float:
    """Return the eigenvalue, relative to the largest of `size`, down to which a direction is seen."""
    eps, stored = accuracy
    return max(size * eps, stored / math.sqrt(size))  # roundings of stored entries are independent of each other


def _two_kronecker(outputs: Sequence[Tensor], inputs: Sequence[Tensor], r: Tensor, accuracy: Accuracy) -> Tensor:
    """Solve B₁ Z A₁ + B₂ Z A₂ = r by diagonalizing (B₁, B₂) and (A₁, A₂) at once.

    With Pᵀ B₁ P = diag(s), Pᵀ (B₁ + B₂) P = I and likewise R, g for A, Y = P⁻¹ Z R⁻ᵀ solves
    (s gᵀ + (1 − s)(1 − g)ᵀ) * Y = Pᵀ r R entry by entry.
    """
    P, s = _simultaneous(outputs[0], outputs[1], accuracy)
    R, g = _simultaneous(inputs[0], inputs[1], accuracy)
    denominator = torch.outer(s, g) + torch.outer(1 - s, 1 - g)
    seen = denominator > _cutoff(max(r.shape), accuracy)
    Y = torch.where(seen, (P.T @ in_float64(r) @ R) / torch.where(seen, denominator, 1), 0)
    return _onto_two_ranges(outputs, inputs, P @ Y @ R.T, accuracy)


def _onto_two_ranges(outputs: Sequence[Tensor], inputs: Sequence[Tensor], Z: Tensor, accuracy: Accuracy) -> Tensor:
    """Project Z onto range(B₁ ⊗ A₁) + range(B₂ ⊗ A₂), the range of the sum: what no expert saw is left out.

    P and R above are not orthogonal, so zeros in Y do not do that. Along the principal vectors of the two ranges, with
    cosines c of the B's and d of the A's, the projection falls into pairs with Gram matrix [[1, c d], [c d, 1]].
    """
    (Q1, Q2), (S1, S2) = ([_range(matrix, accuracy) for matrix in pair] for pair in (outputs, inputs))
    if Q1.shape[0] == Q1.shape[1] and S1.shape[0] == S1.shape[1]:
        return Z
    if Q2.shape[0] == Q2.shape[1] and S2.shape[0] == S2.shape[1]:
        return Z
    U, c, V = torch.linalg.svd(Q1.T @ Q2)
    W, d, X = torch.linalg.svd(S1.T @ S2)
    Q1, Q2, S1, S2 = Q1 @ U, Q2 @ V.T, S1 @ W, S2 @ X.T
    shape = max(Q1.shape[1], Q2.shape[1]), max(S1.shape[1], S2.shape[1])
    a, b, cosine = Z.new_zeros(shape), Z.new_zeros(shape), Z.new_zeros(shape)
    a[: Q1.shape[1], : S1.shape[1]] = Q1.T @ Z @ S1
    b[: Q2.shape[1], : S2.shape[1]] = Q2.T @ Z @ S2
    cosine[: len(c), : len(d)] = torch.outer(c, d).clamp(max=1)
    plus = (a + b) / (1 + cosine) / 2
    apart = 1 - cosine > max(Z.shape) * torch.finfo(Z.dtype).eps
    minus = torch.where(apart, (a - b) / torch.where(apart, 1 - cosine, 1) / 2, 0)
    one, two = (plus + minus)[: Q1.shape[1], : S1.shape[1]], (plus - minus)[: Q2.shape[1], : S2.shape[1]]
    return Q1 @ one @ S1.T + Q2 @ two @ S2.T


def _range(matrix: Tensor, accuracy: Accuracy) -> Tensor:
    """Return an orthonormal basis of the range of a symmetric PSD matrix, as columns."""
    _, vectors, inverse = _seen(matrix, accuracy)
    return torch.linalg.qr(torch.where(inverse > 0, vectors / inverse, 0)).Q


def _simultaneous(a: Tensor, b: Tensor, accuracy: Accuracy) -> tuple[Tensor, Tensor]:
    """Return (P, s) with Pᵀ a P = diag(s) and Pᵀ (a + b) P = I on the range of a + b."""
    a, b = in_float64(a), in_float64(b)
    values, vectors, inverse = _seen(a + b, accuracy)
    whiten = inverse * vectors / values.sqrt()
    s, rotation = torch.linalg.eigh(whiten.T @ a @ whiten)
    return whiten @ rotation, s.clamp(0, 1)


def _seen(matrix: Tensor, accuracy: Accuracy) -> tuple[Tensor, Tensor, Tensor]:
    """Return the eigenvalues of a matrix at a unit diagonal that are no noise, their vectors, and `_unit_diagonal`'s factors."""
    unit, inverse = _unit_diagonal(in_float64(matrix))
    unit.diagonal().mul_(inverse[:, 0] > 0)
    values, vectors = _eigh(unit, accuracy)
    seen = values > _noise(unit, accuracy)
    return values[seen], vectors[:, seen], inverse


def _solve_symmetric(matrix: Tensor, rhs: Tensor, accuracy: Accuracy) -> Tensor:
    """Solve matrix · z = rhs for a symmetric PSD matrix or a stack of them, with z = 0 in the numerical null space.

    An entry of a Gram is as accurate as its two features are large. So rows and columns are scaled to a unit diagonal first,
    where features of any size count alike: with matrix = S U S, what of U is no more than noise is unseen.
    """
    if matrix.dim() == 3:
        return torch.stack([_solve_symmetric(m, r, accuracy) for m, r in zip(matrix, rhs, strict=True)])
    right = in_float64(rhs)
    unit, inverse = _unit_diagonal(in_float64(matrix))
    cutoff = _noise(unit, accuracy)
    factor, failed = torch.linalg.cholesky_ex(unit)
    if not failed and _smallest_eigenvalue(factor) > 2 * cutoff:
        return (inverse * torch.cholesky_solve(inverse * right, factor)).to(rhs)
    values, vectors = _eigh(unit, accuracy)
    seen = values > cutoff
    basis, unseen = inverse * vectors[:, seen], torch.linalg.qr(inverse * vectors[:, ~seen]).Q
    right = right - unseen @ (unseen.T @ right)
    z = basis @ ((basis.T @ right) / values[seen, None])
    return (z - unseen @ (unseen.T @ z)).to(rhs)


def _unit_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a PSD matrix with its rows and columns divided by the roots of its diagonal, and what they are multiplied by.

    A feature that was never seen, whose row and column are zero, is multiplied by zero and has a one on the diagonal.
    """
    diagonal = matrix.diagonal()
    largest = float(diagonal.max()) if len(matrix) else 0.0
    never = diagonal <= 0
    if never.any():
        _refuse_negative(-float(matrix[never].abs().max()), largest)
    inverse = torch.where(never, 0, torch.where(never, 1, diagonal).rsqrt())[:, None]
    unit = (matrix * inverse).mul_(inverse.T)
    unit.diagonal().fill_(1)
    return unit, inverse


def _noise(unit: Tensor, accuracy: Accuracy) -> float:
    """Return the eigenvalue of a matrix with a unit diagonal below which rounding explains it."""
    eps, stored = accuracy
    # Sums are off in any entry. Roundings of stored entries are as large as these are, and independent of each other: the
    # largest eigenvalue of such a matrix is twice the root of the mean of its rows' squares (Wigner 1958).
    return max(len(unit) * eps, 2 * stored * float(torch.linalg.matrix_norm(unit)) / math.sqrt(max(len(unit), 1)))


def _smallest_eigenvalue(factor: Tensor) -> float:
    """Return the smallest eigenvalue of L Lᵀ, estimated from above, to a few tens of percent, by powers of its inverse."""
    probes = torch.randn(len(factor), 4, dtype=factor.dtype, generator=torch.Generator().manual_seed(0)).to(factor)
    for _ in range(12):
        probes = torch.linalg.solve_triangular(factor, torch.nn.functional.normalize(probes, dim=0), upper=False)
        probes = torch.linalg.solve_triangular(factor.mT, probes, upper=True)
    return 1 / float(torch.linalg.vector_norm(probes, dim=0).max()) if len(factor) else math.inf


def _eigh(matrix: Tensor, accuracy: Accuracy) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and eigenvectors of a matrix that has to be positive semidefinite."""
    values, vectors = torch.linalg.eigh(in_float64(matrix))
    if len(values):
        _refuse_negative(float(values[0]), float(values.abs().max()), max(accuracy))
    return values, vectors


def _refuse_negative(smallest: float, largest: float, eps: float = 0.0) -> None:
    """Raise `NumericalError` for an eigenvalue below −√ε times the largest, which rounding of a Gram does not explain."""
    if smallest < -math.sqrt(eps) * largest:
        raise NumericalError(f"negative curvature {smallest:.3g} beside {largest:.3g}: not positive semidefinite")


def in_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the CPU when its device has no float64."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()
