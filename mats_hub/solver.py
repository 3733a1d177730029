"""Solvers of A x = b from an initialization x₀: conjugate gradient stopped after k iterations, and exact solvers.

Both keep the initialization in directions that no expert's data ever saw (the null space of A): conjugate gradient by
itself, since its steps lie in the range of A; the exact solvers by solving A z = b − A x₀ with a stated rank cut-off and
returning x₀ + z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import reduce
from operator import add

import torch
from torch import Tensor

from mats_hub.curvature import Curvature, Dense, Diagonal, Gram, Identity, Kronecker, LowRank, Sum
from mats_hub.errors import NumericalError
from mats_hub.linear_system import LinearSystem


class Outcome(StrEnum):
    """How a solve ended; the values are what reports and cards show."""

    ITERATIONS = "stopped after the iterations asked for"
    CONVERGED = "reached the tolerance"
    FIXED_POINT = "the initialization already solves it"
    ROUNDING = "reached the rounding error of the arithmetic"
    EXACT = "solved exactly"


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes:
        value: x, in the weight's shape.
        outcome: how the solve ended.
        iterations: the number of conjugate-gradient steps taken; 0 for an exact solver.
        residuals: ‖b − A x‖ / ‖b‖ at the initialization and after each step, as the recurrence gives them.
        residual: ‖b − A x‖ / ‖b‖ of `value`, recomputed.
        iterates: x after each number of steps that was asked for.

    """

    value: Tensor
    outcome: Outcome
    iterations: int
    residuals: tuple[float, ...]
    residual: float
    iterates: dict[int, Tensor] = field(default_factory=dict)


NARROW = 1e-5
"""Rounding error above which curvatures count as stored in a narrower dtype than float32."""

CHECKED_EVERY = 16
"""Steps of conjugate gradient between two looks of the host at a device that computes on its own."""

Preconditioner = Callable[[Tensor], Tensor]
Accuracy = tuple[float, float]
"""`LinearSystem.eps` and `LinearSystem.accuracy`."""


def conjugate_gradient(
    system: LinearSystem,
    x0: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
    preconditioner: Preconditioner | None = None,
    iterates: Sequence[int] = (),
) -> Solution:
    """Solve A x = b by the conjugate gradient method (Hestenes & Stiefel 1952), at most `iterations` steps from `x0`.

    The correction z = (x − x₀) / ‖b − A x₀‖ is what is iterated on: its right-hand side has norm one, so that neither
    tiny nor huge curvatures under- or overflow, and the iterates are those of the textbook method.

    Args:
        system: the system of one weight.
        x0: the initialization, in the weight's shape.
        iterations: the largest number of steps; stopping there is part of the method, not a failure.
        tolerance: stop as soon as ‖b − A x‖ < tolerance · ‖b‖, tested before each step.
        preconditioner: r ↦ M⁻¹ r with M symmetric positive definite; another path than the plain method's, so that
            the same number of steps gives another model.
        iterates: numbers of steps at which to keep a copy of x, so that one run serves a search over k.

    Raises:
        NumericalError: a non-finite value, or a direction of negative curvature.

    """
    return conjugate_gradients(
        system,
        x0,
        iterations=iterations,
        tolerance=tolerance,
        preconditioner=preconditioner,
        iterates=iterates,
        batched=False,
    )[0]


def conjugate_gradients(
    system: LinearSystem,
    x0: Tensor,
    *,
    iterations: int,
    tolerance: float = 0.0,
    preconditioner: Preconditioner | None = None,
    iterates: Sequence[int] = (),
    batched: bool = True,
) -> list[Solution]:
    """Solve several systems of one shape at once, each as `conjugate_gradient` does: x0 and the system have one more dimension.

    A system that is done waits for the others. Every number that a step depends on stays on the device, and the host looks
    at it once in `CHECKED_EVERY` steps.

    Raises:
        NumericalError: as for one system; its `position` says which one.

    """
    dims = tuple(range(int(batched), x0.dim()))
    x, r = x0.clone(), system.residual(x0)
    start = _norms(r, dims)
    b_norm = _norms(system.rhs, dims)
    reference = torch.where(b_norm > 0, b_norm, torch.where(start > 0, start, 1))
    unfit = ~(start.isfinite() & b_norm.isfinite())
    if unfit.any():
        position = int(unfit.flatten().nonzero()[0])
        raise NumericalError("the linear system has a non-finite right-hand side or initialization", position)
    history = [start / reference]
    solved = (start == 0) | (start < tolerance * reference)
    outcomes = [Outcome.ITERATIONS, Outcome.CONVERGED, Outcome.FIXED_POINT, Outcome.ROUNDING]
    iterating, converged, fixed_point, rounded, not_finite, negative = range(6)
    state = torch.where(solved, fixed_point, iterating)
    precondition = preconditioner or (lambda residual: residual)
    r = r / torch.where(start > 0, start, 1).to(r.dtype)
    p = y = precondition(r)
    ry = _dots(r, y, dims)
    steps, largest, travelled = torch.zeros_like(state), torch.zeros_like(ry), torch.zeros_like(ry)
    left, least = torch.ones_like(ry), torch.zeros_like(ry)
    # In a narrow dtype rounding bends the small directions of a product of factors far below zero, too.
    rounding, narrow = 4 * system.eps, system.accuracy > NARROW
    kept = {0: x0.clone()} if 0 in iterates else {}
    every = 1 if x0.device.type == "cpu" else CHECKED_EVERY
    for step in range(1, iterations + 1):
        if (step - 1) % every == 0 and not (state == iterating).any():
            break
        Ap = system.operator.matvec(p)
        curvature, size = _dots(p, Ap, dims), _norms(p, dims) ** 2
        # The product A p is off by up to ε ‖A‖ ‖p‖: below that, p is a null direction and a step along it would be noise.
        # The steps leave the sum of these in r: once r is no larger, more steps only carry it into the null directions.
        largest = torch.where(size > 0, torch.maximum(largest, curvature / size), largest)
        lost = (curvature.abs() <= rounding * largest * size) | (ry <= 0) | (left <= rounding * largest * travelled)
        lost = lost | (curvature <= 0) if narrow else lost
        ended = torch.where(lost, rounded, torch.where(curvature < 0, negative, iterating))
        ended = torch.where(curvature.isfinite() & ry.isfinite(), ended, not_finite)
        state = torch.where(state == iterating, ended, state)
        least = torch.where((state == negative) & (least == 0), curvature, least)
        active = state == iterating
        alpha = torch.where(active, ry / curvature, 0)
        x.addcmul_((alpha * start).to(x.dtype), p)
        r = r - alpha.to(r.dtype) * Ap
        steps += active
        travelled = travelled + alpha * size.sqrt()
        left = _norms(r, dims)
        history.append(left * start / reference)
        state = torch.where(active & (history[-1] < tolerance), converged, state)
        if step in iterates:
            kept[step] = x.clone()
        y = precondition(r)
        ry, previous = _dots(r, y, dims), ry
        p = y + torch.where(state == iterating, ry / previous, 0).to(p.dtype) * p
    final = _norms(system.residual(x), dims) / reference
    residuals = torch.stack(history).flatten(1).T.tolist()
    found = []
    columns = (tensor.flatten().tolist() for tensor in (state, steps, least, final))
    for position, (ended, count, below, residual) in enumerate(zip(*columns, strict=True)):
        if ended == not_finite:
            raise NumericalError(f"a non-finite value at iteration {count + 1} of conjugate gradient", position)
        if ended == negative:
            raise NumericalError(
                f"negative curvature {below:.3g} at iteration {count + 1}: not positive semidefinite", position
            )
        if not math.isfinite(residual):
            raise NumericalError(f"a non-finite solution after {count} iterations of conjugate gradient", position)
        own = position if batched else ...
        copies = {k: kept.get(k, x)[own] for k in iterates}
        path = tuple(residuals[position][: count + 1])
        found.append(Solution(x[own], outcomes[ended], count, path, residual, copies))
    return found


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


def exact(system: LinearSystem, x0: Tensor) -> Solution:
    """Solve A x = b where a closed form exists, keeping `x0` in the null space of A.

    Closed forms: identity and diagonal by division; a Gram or dense matrix by Cholesky, or by its eigenvalues when it is
    numerically rank-deficient; one Kronecker product by its factors; two by diagonalizing both pairs of factors at once.
    Factorizations run in float64 where the device has it. Directions whose eigenvalue is at most n · ε · λ_max, with ε the
    system's rounding error, or at most its accuracy / √n times λ_max, count as unseen.

    Raises:
        NumericalError: a non-finite value, or a curvature that is not positive semidefinite.
        ValueError: the system has no closed form (three or more Kronecker products, or mixed kinds).

    """
    r = system.residual(x0)
    start, reference = _sizes(system, r)
    value = x0 + _closed_form(system, r).to(x0)
    before, after = start / reference, _norm(system.residual(value)) / reference
    if not math.isfinite(after):
        raise NumericalError("a non-finite solution of the exact solver")
    outcome = Outcome.FIXED_POINT if before == 0 else Outcome.EXACT
    return Solution(value, outcome, 0, (before, after), after)


def has_closed_form(kinds: Sequence[type]) -> bool:
    """Tell whether `exact` solves a system of curvatures of these classes, one per expert."""
    simple = (
        set(kinds) <= {Identity, Diagonal} or set(kinds) <= {Identity, Gram, LowRank} or set(kinds) <= {Identity, Dense}
    )
    return simple or (set(kinds) == {Kronecker} and len(kinds) <= 2)


def _sizes(system: LinearSystem, r: Tensor) -> tuple[float, float]:
    """Return ‖r‖ and the norm it is measured against: ‖b‖, or ‖r‖ itself, or 1 where both are zero."""
    start, b_norm = _norm(r), _norm(system.rhs)
    if not math.isfinite(start) or not math.isfinite(b_norm):
        raise NumericalError("the linear system has a non-finite right-hand side or initialization")
    return start, b_norm or start or 1.0


def _closed_form(system: LinearSystem, r: Tensor) -> Tensor:
    """Return z with A z = r and no component in the null space of A."""
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
        return _solve_symmetric(operator.input, _solve_symmetric(operator.output, r, accuracy).mT, accuracy).mT
    rows = _rows_and_columns(operator)
    if rows is not None:
        return _solve_rows_and_columns(*rows, r, accuracy)
    pair = system.curvatures
    if len(pair) == 2 and isinstance(pair[0], Kronecker) and isinstance(pair[1], Kronecker):
        if r.dim() == 2:
            return _two_kronecker(pair[0], pair[1], r, accuracy)
        stacks = zip(pair[0].output, pair[0].input, pair[1].output, pair[1].input, r, strict=True)
        return torch.stack([_two_kronecker(Kronecker(a, b), Kronecker(c, d), x, accuracy) for a, b, c, d, x in stacks])
    kinds = ", ".join(type(c).__name__ for c in pair)
    raise ValueError(f"no closed form for {len(pair)} experts with curvatures {kinds}: use conjugate gradient")


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
    total = _wide(c) + values.clamp(min=0)
    seen = total > _cutoff(len(A), accuracy) * total.max()
    return torch.where(seen, (_wide(r) @ vectors) / torch.where(seen, total, 1), 0) @ vectors.T


def _cutoff(size: int, accuracy: Accuracy) -> float:
    """Return the eigenvalue, relative to the largest of `size`, down to which a direction is seen."""
    eps, stored = accuracy
    return max(size * eps, stored / math.sqrt(size))  # roundings of stored entries are independent of each other


def _two_kronecker(first: Kronecker, second: Kronecker, r: Tensor, accuracy: Accuracy) -> Tensor:
    """Solve B₁ Z A₁ + B₂ Z A₂ = r by diagonalizing (B₁, B₂) and (A₁, A₂) at once.

    With Pᵀ B₁ P = diag(s), Pᵀ (B₁ + B₂) P = I and likewise R, g for A, Y = P⁻¹ Z R⁻ᵀ solves
    (s gᵀ + (1 − s)(1 − g)ᵀ) * Y = Pᵀ r R entry by entry.
    """
    P, s = _simultaneous(first.output, second.output, accuracy)
    R, g = _simultaneous(first.input, second.input, accuracy)
    denominator = torch.outer(s, g) + torch.outer(1 - s, 1 - g)
    seen = denominator > _cutoff(max(r.shape), accuracy)
    Y = torch.where(seen, (P.T @ _wide(r) @ R) / torch.where(seen, denominator, 1), 0)
    return _onto_two_ranges(first, second, P @ Y @ R.T, accuracy)


def _onto_two_ranges(first: Kronecker, second: Kronecker, Z: Tensor, accuracy: Accuracy) -> Tensor:
    """Project Z onto range(B₁ ⊗ A₁) + range(B₂ ⊗ A₂), the range of the sum: what no expert saw is left out.

    P and R above are not orthogonal, so zeros in Y do not do that. Along the principal vectors of the two ranges, with
    cosines c of the B's and d of the A's, the projection falls into pairs with Gram matrix [[1, c d], [c d, 1]].
    """
    (Q1, Q2), (S1, S2) = (
        [_range(matrix, accuracy) for matrix in pair]
        for pair in ((first.output, second.output), (first.input, second.input))
    )
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
    values, vectors = _eigh(matrix, accuracy)
    return vectors[:, values > _cutoff(len(values), accuracy) * values[-1].clamp(min=0)]


def _simultaneous(a: Tensor, b: Tensor, accuracy: Accuracy) -> tuple[Tensor, Tensor]:
    """Return (P, s) with Pᵀ a P = diag(s) and Pᵀ (a + b) P = I on the range of a + b."""
    a, b = _wide(a), _wide(b)
    values, vectors = torch.linalg.eigh(a + b)
    keep = values > _cutoff(len(values), accuracy) * values[-1].clamp(min=0)
    whiten = vectors[:, keep] / values[keep].sqrt()
    s, rotation = torch.linalg.eigh(whiten.T @ a @ whiten)
    return whiten @ rotation, s.clamp(0, 1)


def _solve_symmetric(matrix: Tensor, rhs: Tensor, accuracy: Accuracy) -> Tensor:
    """Solve matrix · z = rhs for a symmetric PSD matrix or a stack of them, with z = 0 in the numerical null space."""
    if matrix.dim() == 3:
        return torch.stack([_solve_symmetric(m, r, accuracy) for m, r in zip(matrix, rhs, strict=True)])
    wide, right = _wide(matrix), _wide(rhs)
    cutoff = _cutoff(len(wide), accuracy)
    factor, failed = torch.linalg.cholesky_ex(wide)
    pivots = factor.diagonal() ** 2
    # A pivot bounds the smallest eigenvalue from above; 1e3 of margin keeps nearly singular matrices with `eigh`.
    if not failed and pivots.min() > 1e3 * cutoff * pivots.max():
        return torch.cholesky_solve(right, factor).to(rhs)
    values, vectors = _eigh(matrix, accuracy)
    keep = values > cutoff * values[-1].clamp(min=0)
    basis = vectors[:, keep]
    return (basis @ ((basis.T @ right) / values[keep, None])).to(rhs)


def _eigh(matrix: Tensor, accuracy: Accuracy) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and eigenvectors of a matrix that has to be positive semidefinite."""
    values, vectors = torch.linalg.eigh(_wide(matrix))
    if len(values):
        _refuse_negative(float(values[0]), float(values.abs().max()), max(accuracy))
    return values, vectors


def _refuse_negative(smallest: float, largest: float, eps: float = 0.0) -> None:
    """Raise `NumericalError` for an eigenvalue below −√ε times the largest, which rounding of a Gram does not explain."""
    if smallest < -math.sqrt(eps) * largest:
        raise NumericalError(f"negative curvature {smallest:.3g} beside {largest:.3g}: not positive semidefinite")


def _damped_cholesky(matrix: Tensor, damping: float, accuracy: float = 0.0) -> Tensor:
    """Return L with L Lᵀ = matrix + `damping` · its mean diagonal · I.

    Rounding may have made a matrix indefinite that came with a larger rounding error, `accuracy`: it is damped more then, up
    to 100 times that error.
    """
    wide = _wide(matrix)
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


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the CPU when its device has no float64."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def _dots(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (a * b).sum(dims, keepdim=True, dtype=None if a.device.type == "mps" else torch.float64)


def _norms(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    dtype = None if a.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(a, dim=dims, keepdim=True, dtype=dtype)


def _norm(a: Tensor) -> float:
    return float(_norms(a, tuple(range(a.dim()))))
