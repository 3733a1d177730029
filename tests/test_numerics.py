"""Arithmetic under stress: curvatures over many orders of magnitude, without rank or data; huge and tiny vectors."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mats_hub.curvature import Curvature, Diagonal, Gram, Kronecker
from mats_hub.errors import NumericalError
from mats_hub.linear_system import LinearSystem, match
from mats_hub.preconditioner import kronecker_preconditioner
from mats_hub.solver import conjugate_gradient, exact

OUT, IN = 12, 16


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spread(size: int, seed: int, orders: float, rank: int) -> Tensor:
    """Return a PSD matrix whose `rank` eigenvalues fall over so many orders of magnitude; the others are zero."""
    basis = torch.linalg.qr(draw(size, size, seed=seed))[0]
    values = 10.0 ** -torch.linspace(0, orders, size, dtype=torch.float64) * (torch.arange(size) < rank)
    return (basis * values) @ basis.T


MAKE = {
    "gram": lambda seed, orders, rank: Gram(spread(IN, seed, orders, rank)),
    "kronecker": lambda seed, orders, rank: Kronecker(
        spread(OUT, seed, orders / 2, rank), spread(IN, seed + 50, orders / 2, rank)
    ),
    "diagonal": lambda seed, orders, rank: Diagonal(
        10.0 ** (-orders * draw(OUT, IN, seed=seed).sigmoid()) * (draw(OUT, IN, seed=seed + 7) < rank / 4 - 2)
    ),
}
SOLVERS = {
    "cg": lambda system, start: conjugate_gradient(system, start, iterations=200).value,
    "preconditioned": lambda system, start: (
        conjugate_gradient(system, start, iterations=30, preconditioner=kronecker_preconditioner(system)).value
    ),
    "damped": lambda system, start: conjugate_gradient(damped(system, start), start, iterations=200).value,
    "exact": lambda system, start: exact(system, start).value,
}
CASES = [
    *((kind, solver) for kind in MAKE for solver in ("cg", "damped")),
    ("kronecker", "preconditioned"), ("gram", "exact"), ("diagonal", "exact"),
]  # fmt: skip


def damped(system: LinearSystem, start: Tensor) -> LinearSystem:
    return LinearSystem(
        (*system.curvatures, system.damping(0.01, start.shape)), (*system.deltas, start), system.accuracy
    )


def zero(curvature: Curvature) -> Curvature:
    return curvature.scaled(0.0)


@functools.cache
def stressed(kind: str, orders: float, rank: int, without: bool, size: float, seed: int) -> LinearSystem:
    curvatures = [MAKE[kind](seed + number, orders, rank) for number in range(3)]
    if without:
        curvatures[1] = zero(curvatures[1])
    deltas = [size * draw(OUT, IN, seed=seed + 30 + number) for number in range(3)]
    return match(curvatures, deltas, [1.0, 0.5, 2.0])


@pytest.mark.parametrize(("kind", "solver"), CASES, ids=[" ".join(case) for case in CASES])
@settings(deadline=None, max_examples=40)
@given(
    orders=st.sampled_from([0.0, 6.0, 12.0]), rank=st.sampled_from([1, 5, 16]), without=st.booleans(),
    size=st.sampled_from([1e-20, 1e-6, 1.0, 1e6, 1e15]), given_in=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 50),
)  # fmt: skip
def test_a_solve_is_finite_and_no_worse_than_where_it_began(kind, solver, orders, rank, without, size, given_in, seed):
    """Curvatures are rounded to what they may be stored in, which can make them indefinite; all is computed in float32."""
    system = stressed(kind, orders, rank, without, size, seed)
    curvatures = [c.to("cpu", given_in).to("cpu", torch.float32) for c in system.curvatures]
    narrow = LinearSystem(tuple(curvatures), tuple(d.float() for d in system.deltas), torch.finfo(given_in).eps)
    start = sum(narrow.deltas) / 3
    try:
        value = SOLVERS[solver](narrow, start)
    except NumericalError:  # said, and not hidden
        return
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    wide = LinearSystem(tuple(c.to("cpu", torch.float64) for c in curvatures), tuple(d.double() for d in narrow.deltas))
    solved = damped(wide, start.double()) if solver == "damped" else wide
    first, last = (solved.residual(x.double()) for x in (start, value))
    step = value.double() - start.double()
    # ½ xᵀA x − bᵀx, which conjugate gradient lowers with every step: the residual's norm may grow on the way.
    gained = -0.5 * ((first + last) * step).sum()
    assert gained <= 1e-4 * (solved.rhs.norm() * start.norm()).double()


@pytest.mark.parametrize("kind", MAKE)
def test_float32_is_near_float64_where_the_system_is_well_posed(kind):
    system = stressed(kind, 1.0, 16 if kind != "diagonal" else 60, False, 1.0, 0)
    start = sum(system.deltas) / 3
    narrow = LinearSystem(
        tuple(c.to("cpu", torch.float32) for c in system.curvatures), tuple(d.float() for d in system.deltas)
    )
    wide = conjugate_gradient(system, start, iterations=500, tolerance=1e-12).value
    near = conjugate_gradient(narrow, start.float(), iterations=500).value.double()
    assert (near - wide).norm() <= 1e-3 * wide.norm()
