"""Solvers of A x = b from an initialization x₀: conjugate gradient stopped after k iterations, and exact solvers.

Both keep the initialization in directions that no expert's data ever saw (the null space of A): conjugate gradient by
itself, since its steps lie in the range of A; the exact solvers by solving A z = b − A x₀ with a stated rank cut-off and
returning x₀ + z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mats_hub.closed_form import closed_form
from mats_hub.errors import NumericalError
from mats_hub.linear_system import LinearSystem
from mats_hub.preconditioner import Preconditioner


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

OUTCOMES = (Outcome.ITERATIONS, Outcome.CONVERGED, Outcome.FIXED_POINT, Outcome.ROUNDING)
ITERATING, CONVERGED, FIXED_POINT, ROUNDED, NOT_FINITE, NEGATIVE = range(6)
"""States of a system that is solved: the first four end as `OUTCOMES` says."""

CHECKED_EVERY = 4
"""Steps of conjugate gradient between two looks of the host at a device that computes on its own; few suffice to a tolerance."""


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


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
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
    at it once in `CHECKED_EVERY` steps; on the CPU NumPy computes with these numbers, which takes a fraction of torch's time.

    Raises:
        NumericalError: as for one system; its `position` says which one.

    """
    dims, on_cpu = tuple(range(int(batched), x0.dim())), x0.device.type == "cpu"
    xp: Any = np if on_cpu else torch

    def dots(a: Tensor, b: Tensor) -> Any:
        """Return the systems' inner products, as `xp` has them."""
        return _dots(a, b, dims).numpy() if on_cpu else _dots(a, b, dims)

    def norms(a: Tensor) -> Any:
        """Return the systems' norms, as `xp` has them."""
        return _norms(a, dims).numpy() if on_cpu else _norms(a, dims)

    def tensor(numbers: Any) -> Tensor:
        """Return numbers of `xp` as factors of the systems' tensors."""
        return (torch.from_numpy(numbers) if on_cpu else numbers).to(x0.dtype)

    x, r = x0.clone(), system.residual(x0)
    start, b_norm = norms(r), norms(system.rhs)
    reference = xp.where(b_norm > 0, b_norm, xp.where(start > 0, start, 1))
    unfit = (~(xp.isfinite(start) & xp.isfinite(b_norm))).flatten().tolist()
    if any(unfit):
        raise NumericalError("the linear system has a non-finite right-hand side or initialization", unfit.index(True))
    history = [start / reference]
    solved = (start == 0) | (start < tolerance * reference)
    state = xp.where(solved, FIXED_POINT, ITERATING)
    r = r / tensor(xp.where(start > 0, start, 1))

    def measured(r: Tensor) -> tuple[Tensor, Any, Any]:
        y, size = preconditioner(r) if preconditioner else r, norms(r)
        return y, size, dots(r, y) if preconditioner else size**2

    p, left, ry = measured(r)
    size = ry
    steps, largest, travelled, least = xp.zeros_like(state), *(xp.zeros_like(ry) for _ in range(3))
    # In a narrow dtype rounding bends the small directions of a product of factors far below zero, too.
    rounding, narrow = 4 * system.eps, system.accuracy > NARROW
    kept = {0: x0.clone()} if 0 in iterates else {}
    every = 1 if on_cpu else CHECKED_EVERY
    for step in range(1, iterations + 1):
        if (step - 1) % every == 0 and not (state == ITERATING).any():
            break
        Ap = system.operator.matvec(p)
        curvature, size = dots(p, Ap), norms(p) ** 2 if preconditioner else size
        # The product A p is off by up to ε ‖A‖ ‖p‖: below that, p is a null direction and a step along it would be noise.
        # The steps leave the sum of these in r: once r is no larger, more steps only carry it into the null directions.
        largest = xp.where(size > 0, xp.maximum(largest, curvature / size), largest)
        lost = (abs(curvature) <= rounding * largest * size) | (ry <= 0) | (left <= rounding * largest * travelled)
        lost = lost | (curvature <= 0) if narrow else lost
        ended = xp.where(lost, ROUNDED, xp.where(curvature < 0, NEGATIVE, ITERATING))
        ended = xp.where(xp.isfinite(curvature) & xp.isfinite(ry), ended, NOT_FINITE)
        state = xp.where(state == ITERATING, ended, state)
        least = xp.where((state == NEGATIVE) & (least == 0), curvature, least)
        active = state == ITERATING
        alpha = xp.where(active, ry / curvature, 0)
        x.addcmul_(tensor(alpha * start), p)
        r = torch.addcmul(r, tensor(alpha), Ap, value=-1)
        steps += active
        travelled = travelled + alpha * size**0.5
        previous = ry
        y, left, ry = measured(r)
        history.append(left * start / reference)
        state = xp.where(active & (history[-1] < tolerance), CONVERGED, state)
        if step in iterates:
            kept[step] = x.clone()
        beta = xp.where(state == ITERATING, ry / previous, 0)
        p = torch.addcmul(y, tensor(beta), p)
        size = left**2 + beta**2 * size  # ‖p‖² without a preconditioner: then r is orthogonal to the last direction
    final = norms(system.residual(x)) / reference
    residuals = xp.stack(history).reshape(len(history), -1).T.tolist()
    columns = zip(*(numbers.flatten().tolist() for numbers in (state, steps, least, final)), strict=True)
    copies = {k: kept.get(k, x) for k in iterates}
    return [
        _solution(position if batched else ..., x, copies, residuals[position], ended, count, curvature, residual)
        for position, (ended, count, curvature, residual) in enumerate(columns)
    ]


def _solution(
    own: Any,
    x: Tensor,
    copies: dict[int, Tensor],
    residuals: list[float],
    ended: int,
    steps: int,
    curvature: float,
    residual: float,
) -> Solution:
    """Return the solution of the system at `own`, the only one where that is ``...``, or raise why it has none."""
    position = 0 if own is ... else own
    if ended == NOT_FINITE:
        raise NumericalError(f"a non-finite value at iteration {steps + 1} of conjugate gradient", position)
    if ended == NEGATIVE:
        raise NumericalError(
            f"negative curvature {curvature:.3g} at iteration {steps + 1}: not positive semidefinite", position
        )
    if not math.isfinite(residual):
        raise NumericalError(f"a non-finite solution after {steps} iterations of conjugate gradient", position)
    kept = {k: copy[own] for k, copy in copies.items()}
    return Solution(x[own], OUTCOMES[ended], steps, tuple(residuals[: steps + 1]), residual, kept)


def exact(system: LinearSystem, x0: Tensor) -> Solution:
    """Solve A x = b where a closed form exists, keeping `x0` in the null space of A.

    Closed forms: identity and diagonal by division; a Gram or dense matrix by Cholesky, or by its eigenvalues when it is
    numerically rank-deficient; one Kronecker product by its factors; two by diagonalizing both pairs of factors at once; a
    diagonal of rows beside a Gram, as of tied embeddings, by the Gram's eigenvectors.
    Factorizations run in float64 where the device has it. Unseen are the directions whose eigenvalue is at most n · ε, with ε
    the system's rounding error, or 2 · its accuracy · ‖·‖ / √n, once rows and columns are scaled to a unit diagonal; of a
    diagonal beside a Gram, n · ε or accuracy / √n times the Gram's largest.

    Raises:
        NumericalError: a non-finite value, or a curvature that is not positive semidefinite.
        ValueError: the system has no closed form (three or more Kronecker products, or mixed kinds).

    """
    r = system.residual(x0)
    start, reference = _sizes(system, r)
    value = x0 + closed_form(system, r).to(x0)
    before, after = start / reference, _norm(system.residual(value)) / reference
    if not math.isfinite(after):
        raise NumericalError("a non-finite solution of the exact solver")
    outcome = Outcome.FIXED_POINT if before == 0 else Outcome.EXACT
    return Solution(value, outcome, 0, (before, after), after)


def _sizes(system: LinearSystem, r: Tensor) -> tuple[float, float]:
    """Return ‖r‖ and the norm it is measured against: ‖b‖, or ‖r‖ itself, or 1 where both are zero."""
    start, b_norm = _norm(r), _norm(system.rhs)
    if not math.isfinite(start) or not math.isfinite(b_norm):
        raise NumericalError("the linear system has a non-finite right-hand side or initialization")
    return start, b_norm or start or 1.0


def _dots(a: Tensor, b: Tensor, dims: tuple[int, ...]) -> Tensor:
    return (a * b).sum(dims, keepdim=True, dtype=None if a.device.type == "mps" else torch.float64)


def _norms(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    dtype = None if a.device.type == "mps" else torch.float64
    return torch.linalg.vector_norm(a, dim=dims, keepdim=True, dtype=dtype)


def _norm(a: Tensor) -> float:
    return float(_norms(a, tuple(range(a.dim()))))
