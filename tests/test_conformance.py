"""What every curvature, solver and initialization must do, whatever it is: dense oracles and invariants in float64."""

from __future__ import annotations

import inspect
import itertools
import math
from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mats_hub.closed_form import has_closed_form
from mats_hub.curvature import Curvature, Dense, Diagonal, Gram, Identity, Kronecker, LowRank, Sum, restrict
from mats_hub.errors import NumericalError
from mats_hub.initialization import INITIALIZATIONS, Context
from mats_hub.initialization.ties import kept_rank
from mats_hub.linear_system import LinearSystem, match, together
from mats_hub.preconditioner import kronecker_preconditioner, nearest_kronecker
from mats_hub.recipe import INITIALIZATION_OPTIONS
from mats_hub.solver import Outcome, conjugate_gradient, conjugate_gradients, exact
from mats_hub.thresholds import MagnitudeRank

OUT, IN = 4, 5
RTOL = 1e-8
WEIGHTS = [1.0, 0.5, 2.0]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def psd(size: int, seed: int, rank: int | None = None, dead: int | None = None) -> Tensor:
    factor = draw(size, rank or size + 2, seed=seed)
    if dead is not None:
        factor[dead] = 0
    return factor @ factor.T / size


def low_rank(seed: int, rank: int | None = None, dead: int | None = None, size: int = IN) -> LowRank:
    """Return a sketch of full rank, through its rest; or of a given rank, one of it through an entry of the rest."""
    factor, rest = draw(size, 2 if rank is None else rank - 1, seed=seed), draw(size, seed=seed + 50) ** 2
    for part in (factor, rest) if dead is not None else ():
        part[dead] = 0
    return LowRank(factor, rest if rank is None else rest * (torch.arange(size) == seed % size))


def sketched(seed: int, **kind) -> Kronecker:
    return Kronecker(low_rank(seed, size=OUT, **kind), low_rank(seed + 50, **kind))


CURVATURES = {
    "identity": lambda seed, **kind: Identity(0.5 + seed),
    "diagonal": lambda seed, **kind: Diagonal(
        draw(OUT, IN, seed=seed) ** 2 * (draw(OUT, IN, seed=99) > -0.5 if kind else 1)
    ),
    "gram": lambda seed, **kind: Gram(psd(IN, seed, **kind)),
    "low rank": low_rank,
    "kronecker": lambda seed, **kind: Kronecker(psd(OUT, seed, **kind), psd(IN, seed + 50, **kind)),
    "sketched kronecker": sketched,
    "kronecker of a matrix and a sketch": lambda seed, **kind: Kronecker(
        psd(OUT, seed, **kind), low_rank(seed + 50, **kind)
    ),
    "dense": lambda seed, **kind: Dense(psd(OUT * IN, seed, **kind)),
    "sum": lambda seed, **kind: (
        Kronecker(psd(OUT, seed, **kind), psd(IN, seed + 50, **kind)) + Gram(psd(IN, seed, **kind))
    ),
}
SOLVERS = {
    "conjugate gradient": lambda system, x0: conjugate_gradient(system, x0, iterations=4000, tolerance=1e-13),
    "preconditioned": lambda system, x0: conjugate_gradient(
        system, x0, iterations=4000, tolerance=1e-13, preconditioner=kronecker_preconditioner(system)
    ),
    "exact": exact,
}


def crossed(experts: int):
    """Yield every curvature with every solver that takes that many experts of it."""
    for (name, make), solver in itertools.product(CURVATURES.items(), SOLVERS):
        kinds = [type(make(seed)) for seed in range(experts)]
        if solver == "preconditioned" and set(kinds) != {Kronecker}:
            continue
        if solver == "exact" and not has_closed_form(kinds):
            continue
        yield pytest.param(make, SOLVERS[solver], id=f"{name}, {solver}, {experts} experts")


EVERY = [*crossed(3), *(case for case in crossed(2) if "exact" in case.id)]


def matrix(curvature: Curvature) -> Tensor:
    """Return a curvature as a dense matrix, column by column."""
    basis = torch.eye(OUT * IN, dtype=torch.float64)
    return torch.stack([curvature.matvec(e.reshape(OUT, IN)).reshape(-1) for e in basis], 1)


def dense(curvature: Curvature) -> Tensor:
    """Return the same matrix from the definition of each class, without its matvec."""
    eye = torch.eye(OUT * IN, dtype=torch.float64)
    match curvature:
        case Identity():
            return curvature.scale * eye
        case Diagonal():
            return curvature.values.reshape(-1).diag()
        case Gram():
            return torch.block_diag(*[curvature.matrix] * OUT)
        case LowRank():
            return torch.block_diag(*[of_sketch(curvature)] * OUT)
        case Kronecker():
            sides = (curvature.output, curvature.input)
            return torch.kron(*(side if isinstance(side, Tensor) else of_sketch(side) for side in sides))
        case Dense():
            return curvature.matrix
        case Sum():
            return sum(dense(term) for term in curvature.terms)


def of_sketch(sketch: LowRank) -> Tensor:
    return sum(torch.outer(column, column) for column in sketch.factor.T) + sketch.rest.diag()


def problem(make, experts: int = 3, seed: int = 0, **kind) -> LinearSystem:
    return match(
        [make(seed + number, **kind) for number in range(experts)],
        [draw(OUT, IN, seed=10 + seed + number) for number in range(experts)],
        WEIGHTS[:experts],
    )


def oracle(system: LinearSystem, x0: Tensor, cutoff: float = 1e-13) -> Tensor:
    """Return x₀ plus the smallest correction that solves the normal equations, by a dense pseudo-inverse."""
    A = sum(dense(c) for c in system.curvatures)
    b = sum(dense(c) @ d.reshape(-1) for c, d in zip(system.curvatures, system.deltas, strict=True))
    return x0 + (torch.linalg.pinv(A, hermitian=True, rtol=cutoff) @ (b - A @ x0.reshape(-1))).reshape(x0.shape)


def close(a: Tensor, b: Tensor, rtol: float = RTOL) -> None:
    assert float((a - b).norm()) <= rtol * max(float(b.norm()), 1e-300)


# Curvatures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CURVATURES.values(), ids=CURVATURES)
def test_a_curvature_is_a_symmetric_psd_map_with_its_diagonal(make):
    curvature = make(1)
    oracle = dense(curvature)
    close(matrix(curvature), oracle, 1e-14)
    close(matrix(curvature), matrix(curvature).T, 1e-14)
    assert torch.linalg.eigvalsh(oracle).min() > -1e-10
    close(curvature.diagonal(torch.Size((OUT, IN))).reshape(-1).double(), oracle.diagonal())
    close(matrix(curvature.scaled(0.3)), 0.3 * oracle)
    assert not matrix(curvature.scaled(0.0)).any()
    assert curvature.to("cpu", torch.float32).matvec(torch.ones(OUT, IN)).dtype == torch.float32
    with pytest.raises(ValueError, match="not negative"):
        curvature.scaled(-1.0)


@pytest.mark.parametrize("pair", itertools.product(CURVATURES, repeat=2), ids=" + ".join)
def test_addition_is_exact(pair):
    a, b = (CURVATURES[name](seed) for seed, name in enumerate(pair))
    close(matrix(a + b), dense(a) + dense(b), 1e-14)
    close(matrix(a + (b + a)), 2 * dense(a) + dense(b), 1e-14)


def test_closed_classes_stay_simple_and_kronecker_factors_are_never_added():
    for name in ("identity", "diagonal", "gram", "low rank", "dense"):
        assert not isinstance(CURVATURES[name](0) + CURVATURES[name](1), Sum)
    a, b = CURVATURES["kronecker"](0), CURVATURES["kronecker"](1)
    assert isinstance(a + b, Sum)
    wrong = Kronecker(a.output + b.output, a.input + b.input)
    assert (matrix(a + b) - matrix(wrong)).norm() > 0.1 * matrix(a + b).norm()
    close(matrix(a + Identity(0.1)), matrix(a) + 0.1 * torch.eye(OUT * IN, dtype=torch.float64))  # damping


SIMPLE = ("identity", "gram", "low rank")
"""Curvatures that act on inputs alone: their sums are exact, and closed in any order."""


@pytest.mark.parametrize("names", itertools.permutations(SIMPLE), ids=" + ".join)
def test_curvatures_of_inputs_add_up_in_any_order_and_are_solved(names):
    parts = [CURVATURES[name](seed) for seed, name in enumerate(names)]
    assert has_closed_form([type(part) for part in parts])
    for terms in (parts, parts[:2], parts[1:], [parts[0], parts[1] + parts[2]]):
        total = reduce(add, terms)
        sketched = not any(isinstance(term, Gram) for term in terms)
        assert type(total) is (LowRank if sketched else Gram)
        close(matrix(total), sum(dense(term) for term in terms), 1e-14)
    system = match(parts, [draw(OUT, IN, seed=10 + seed) for seed in range(3)], WEIGHTS)
    x0 = draw(OUT, IN, seed=5)
    for solve in (exact, SOLVERS["conjugate gradient"]):
        close(solve(system, x0).value, oracle(system, x0), 1e-7)


def test_a_sum_of_sketches_keeps_both_factors():
    a, b = low_rank(0), low_rank(1, rank=3)
    assert (a + b).factor.shape == (IN, 4)
    assert torch.equal((a + Identity(0.5)).factor, a.factor)
    assert isinstance(a.dense(), Gram)
    close(dense(a.dense()), dense(a), 1e-14)
    for other in ("diagonal", "kronecker", "dense"):
        assert isinstance(a + CURVATURES[other](1), Sum)
        assert not has_closed_form([LowRank, type(CURVATURES[other](1))])


RESTRICTED = {
    **{name: CURVATURES[name] for name in ("identity", "gram", "low rank", "kronecker", "sketched kronecker", "sum")},
    "damped": lambda seed: CURVATURES["kronecker"](seed) + Identity(0.1),
    "two": lambda seed: CURVATURES["kronecker"](seed) + CURVATURES["kronecker"](seed + 1),
    "nested": lambda seed: Sum((CURVATURES["sum"](seed), CURVATURES["low rank"](seed))),
}


@pytest.mark.parametrize("size", [1, 2, OUT])
@pytest.mark.parametrize("make", RESTRICTED.values(), ids=RESTRICTED)
def test_restriction_is_the_curvature_between_the_columns_of_a_basis(make, size):
    curvature, basis = make(1), torch.linalg.qr(draw(OUT, size, seed=7))[0]
    lift = torch.einsum("ok,ij->oikj", basis, torch.eye(IN, dtype=torch.float64)).reshape(-1, size * IN)  # Y ↦ Q Y
    inside = restrict(curvature, basis)
    for seed in range(3):
        Y = draw(size, IN, seed=seed)
        expected = lift.T @ dense(curvature) @ lift @ Y.reshape(-1)
        close(inside.matvec(Y).reshape(-1), expected, 1e-13)


@pytest.mark.parametrize("name", ["diagonal", "dense"])
def test_what_is_not_closed_under_restriction_is_refused(name):
    basis = torch.linalg.qr(draw(OUT, 2, seed=7))[0]
    held = CURVATURES[name](1)
    for curvature in (held, held + CURVATURES["kronecker"](1)):
        with pytest.raises(TypeError, match=f"{type(held).__name__} curvature does not restrict"):
            restrict(curvature, basis)


# Solvers ---------------------------------------------------------------------------------------------------------------


def count(request) -> int:
    return int(request.node.callspec.id.split(", ")[-1].split()[0])


@pytest.fixture
def experts(request) -> int:
    return count(request)


@pytest.mark.parametrize(("make", "solve"), EVERY)
class TestEverySolver:
    def test_agrees_with_the_dense_oracle(self, make, solve, experts):
        system, x0 = problem(make, experts), draw(OUT, IN, seed=5)
        solution = solve(system, x0)
        close(solution.value, oracle(system, x0), 1e-7)
        assert solution.residual < 1e-10

    def test_identical_experts_are_a_fixed_point_in_zero_iterations(self, make, solve, experts):
        for dtype in (torch.float64, torch.float32):
            x0 = draw(OUT, IN, seed=5).to(dtype)
            curvatures = [make(seed).to("cpu", dtype) for seed in range(experts)]
            solution = solve(match(curvatures, [x0] * experts, WEIGHTS[:experts]), x0)
            assert (solution.outcome, solution.iterations, solution.residual) == (Outcome.FIXED_POINT, 0, 0.0)
            assert torch.equal(solution.value, x0)

    def test_unseen_directions_keep_the_initialization(self, make, solve, experts):
        x0 = draw(OUT, IN, seed=5)
        dead = problem(make, experts, dead=2)  # an input, and for K-FAC an output too, that no expert's data ever saw
        solution = solve(dead, x0)
        close(solution.value, oracle(dead, x0), 1e-6)
        if make in (CURVATURES["gram"], CURVATURES["low rank"], CURVATURES["kronecker"]):
            close(solution.value[:, 2], x0[:, 2], 1e-9)
        if make is CURVATURES["kronecker"]:
            close(solution.value[2], x0[2], 1e-9)

    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_rank_deficient_curvatures_get_the_smallest_correction(self, make, solve, experts, rank):
        if solve is SOLVERS["preconditioned"]:  # which promises dead inputs and outputs alone, as above
            return
        system, x0 = problem(make, experts, rank=rank), draw(OUT, IN, seed=5)
        solution = solve(system, x0)
        close(solution.value, oracle(system, x0), 1e-6)
        assert solution.residual < 1e-10

    def test_the_scale_of_the_curvature_does_not_matter(self, make, solve, experts):
        system, x0 = problem(make, experts), draw(OUT, IN, seed=5)
        expected = solve(system, x0).value
        for factor in (1e-30, 1e-12, 1e12, 1e30):
            scaled = match([c.scaled(factor) for c in system.curvatures], system.deltas, [1.0] * experts)
            close(solve(scaled, x0).value, expected, 1e-7)

    def test_the_order_of_experts_does_not_matter(self, make, solve, experts):
        system, x0 = problem(make, experts), draw(OUT, IN, seed=5)
        expected = solve(system, x0).value
        for order in itertools.permutations(range(experts)):
            turned = LinearSystem(*(tuple(part[i] for i in order) for part in (system.curvatures, system.deltas)))
            close(solve(turned, x0).value, expected, 1e-7)

    def test_one_expert_comes_back(self, make, solve, experts):
        system = problem(make, 1)
        close(solve(system, draw(OUT, IN, seed=5)).value, system.deltas[0], 1e-6)

    def test_started_at_the_solution_it_stays(self, make, solve, experts):
        system = problem(make, experts)
        solution = oracle(system, draw(OUT, IN, seed=5))
        close(solve(system, solution).value, solution, 1e-7)

    def test_non_finite_values_are_an_error(self, make, solve, experts):
        system, x0 = problem(make, experts), draw(OUT, IN, seed=5)
        (c, *curvatures), (d, *deltas) = system.curvatures, system.deltas
        endless = c.scaled(float("inf"))
        for bad, curvature in ((float("inf"), endless), (float("nan"), endless.scaled(0.0))):
            for first, delta, start in ((c, d * bad, x0), (c, d, x0 * bad), (curvature, d, x0)):
                broken = LinearSystem((first, *curvatures), (delta, *deltas))
                with pytest.raises(NumericalError, match="non-finite"):
                    solve(broken, start)

    def test_the_residuals_are_those_of_the_solution(self, make, solve, experts):
        system, x0 = problem(make, experts), draw(OUT, IN, seed=5)
        solution = solve(system, x0)
        A = sum(dense(c) for c in system.curvatures)
        b = sum(dense(c) @ d.reshape(-1) for c, d in zip(system.curvatures, system.deltas, strict=True))
        ends = [float((b - A @ x.reshape(-1)).norm() / b.norm()) for x in (x0, solution.value)]
        assert [solution.residuals[0], solution.residual] == pytest.approx(ends, rel=RTOL, abs=1e-12)
        assert solution.residuals[-1] == pytest.approx(ends[1], rel=RTOL, abs=1e-12)
        assert len(solution.residuals) == (2 if solve is exact else solution.iterations + 1)


@pytest.mark.parametrize("make", CURVATURES.values(), ids=CURVATURES)
def test_iterates_of_one_run_are_those_of_separate_runs(make):
    system, x0 = problem(make), draw(OUT, IN, seed=5)
    before = x0.clone()
    for preconditioner in {None, kronecker_preconditioner(system)}:
        run = conjugate_gradient(system, x0, iterations=6, iterates=(0, 2, 4, 6), preconditioner=preconditioner)
        for steps in (0, 2, 4, 6):
            separate = conjugate_gradient(system, x0, iterations=steps, preconditioner=preconditioner)
            close(run.iterates[steps], separate.value)
            assert separate.residuals == run.residuals[: len(separate.residuals)]
            if separate.outcome is Outcome.ITERATIONS:
                assert separate.residuals[-1] == pytest.approx(separate.residual, rel=1e-6, abs=1e-13)
    assert torch.equal(x0, before)


@pytest.mark.parametrize("name", ["identity", "diagonal", "gram", "kronecker", "sketched kronecker"])
def test_systems_solved_together_are_solved_as_each_alone(name):
    """One is its own solution already, one is rank-deficient, one tiny, and one damped as the others are."""
    low = {"rank": 3 if "sketched" in name else 2} if "gram" in name or "kronecker" in name else {}
    systems = [problem(CURVATURES[name], seed=seed, **(low if seed == 1 else {})) for seed in range(4)]
    tiny = tuple(curvature.scaled(1e-9) for curvature in systems[2].curvatures)
    systems[2] = LinearSystem(tiny, systems[2].deltas)
    starts = [draw(OUT, IN, seed=5 + number) for number in range(4)]
    damped = [
        LinearSystem((*s.curvatures, s.damping(0.01 * number, x.shape)), (*s.deltas, x))
        for number, (s, x) in enumerate(zip(systems, starts, strict=True))
    ]
    for group in (systems, damped):
        joint = together(group)
        starts[0] = conjugate_gradient(group[0], starts[0], iterations=4000, tolerance=1e-14).value
        for precondition in (lambda system: None, kronecker_preconditioner):
            options = {"iterations": 8, "tolerance": 1e-6, "iterates": (2,)}
            made = conjugate_gradients(joint, torch.stack(starts), preconditioner=precondition(joint), **options)
            for system, x0, ours in zip(group, starts, made, strict=True):
                alone = conjugate_gradient(system, x0, preconditioner=precondition(system), **options)
                assert (ours.outcome, ours.iterations) == (alone.outcome, alone.iterations)
                close(ours.value, alone.value, 1e-8)
                close(ours.iterates[2], alone.iterates[2], 1e-8)
                assert ours.residual == pytest.approx(alone.residual, rel=1e-4, abs=1e-12)
                assert ours.residuals == pytest.approx(alone.residuals, rel=1e-4, abs=1e-12)
    assert together([systems[0], LinearSystem((Dense(psd(OUT * IN, 1)),) * 3, systems[0].deltas)]) is None


def test_of_systems_solved_together_the_bad_one_is_named():
    good = [LinearSystem((Gram(psd(IN, seed)),), (draw(OUT, IN, seed=seed),)) for seed in (1, 2)]
    negative = LinearSystem((Gram(-psd(IN, 3)),), good[0].deltas)
    infinite = LinearSystem(good[0].curvatures, (good[0].deltas[0] * math.inf,))
    for bad, text in ((negative, "negative curvature"), (infinite, "non-finite")):
        with pytest.raises(NumericalError, match=text) as caught:
            conjugate_gradients(together([*good, bad]), torch.zeros(3, OUT, IN).double(), iterations=5)
        assert caught.value.position == 2


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["gram", "low rank", "kronecker", "sketched kronecker", "dense", "sum"])
def test_steps_past_convergence_do_not_carry_rounding_into_unseen_directions(name, rank):
    double, x0 = problem(CURVATURES[name], 2, rank=rank), draw(OUT, IN, seed=5)
    single = [c.to("cpu", torch.float32) for c in double.curvatures], [d.float() for d in double.deltas]
    for curvatures, deltas, rtol in ((double.curvatures, double.deltas, 1e-7), (*single, 1e-2)):
        system, start = LinearSystem(tuple(curvatures), tuple(deltas)), x0.to(deltas[0])
        wide = LinearSystem(tuple(c.to("cpu", torch.float64) for c in curvatures), tuple(d.double() for d in deltas))
        expected = oracle(wide, start.double(), 1e-13 if start.dtype == torch.float64 else 1e-6)
        solution = conjugate_gradient(system, start, iterations=2000)
        assert solution.outcome is Outcome.ROUNDING
        close(solution.value.double(), expected, rtol)


def test_a_search_over_k_can_ask_for_no_step_at_all():
    system, x0 = problem(CURVATURES["gram"]), draw(OUT, IN, seed=5)
    run = conjugate_gradient(system, x0, iterations=3, iterates=(0,))
    assert torch.equal(run.iterates[0], x0)
    assert torch.equal(conjugate_gradient(system, x0, iterations=0).value, x0)


def test_the_residual_keeps_its_digits_beside_large_values():
    system = problem(CURVATURES["gram"])
    curvatures = tuple(c.to("cpu", torch.float32) for c in system.curvatures)
    x = (1e4 + draw(OUT, IN, seed=5)).float()
    near = LinearSystem(curvatures, tuple(x + delta.float() for delta in system.deltas))
    expected = sum(c.matvec((d - x).double()) for c, d in zip(system.curvatures, near.deltas, strict=True))
    close(near.residual(x).double(), expected, 1e-5)


def test_the_preconditioner_saves_iterations():
    system, x0 = problem(CURVATURES["kronecker"]), draw(OUT, IN, seed=5)
    plain, fast = (SOLVERS[name](system, x0).iterations for name in ("conjugate gradient", "preconditioned"))
    assert fast < plain
    assert kronecker_preconditioner(problem(CURVATURES["gram"])) is None


@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize(
    "make",
    [
        lambda seed: CURVATURES["diagonal"](seed, dead=1),
        lambda seed: LowRank(torch.zeros(IN, 0).double(), low_rank(seed, dead=1).rest),
    ],
    ids=["of entries", "of columns"],
)
def test_a_diagonal_system_is_solved_in_one_preconditioned_step(make, damping):
    """As of embeddings, whose tokens are seen a few times or thousands of times; plain steps do not get there."""
    system, x0 = problem(make), draw(OUT, IN, seed=5)
    system = LinearSystem((*system.curvatures, system.damping(damping, x0.shape)), (*system.deltas, x0))
    found = conjugate_gradient(
        system, x0, iterations=30, tolerance=1e-12, preconditioner=kronecker_preconditioner(system)
    )
    assert found.iterations == 1
    close(found.value, exact(system, x0).value, 1e-12)


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "stacked"])
@pytest.mark.parametrize("damped", [False, True], ids=["as it is", "beside an identity"])
def test_sketches_are_solved_and_preconditioned_as_the_matrices_they_stand_for(damped, stacked):
    out, inner, experts = 30, 50, 3
    shape = torch.Size((out, inner))

    def system(seed: int, write_out: bool) -> LinearSystem:
        made = [Kronecker(low_rank(seed + n, size=out), low_rank(seed + n + 7, size=inner)) for n in range(experts)]
        deltas = [draw(out, inner, seed=seed + 20 + n) for n in range(experts)]
        found = match([c.dense() if write_out else c for c in made], deltas, WEIGHTS)
        if not damped:
            return found
        return LinearSystem((*found.curvatures, found.damping(0.1, shape)), (*found.deltas, deltas[0]))

    sketched, matrices = ([system(seed, write_out) for seed in (0, 100)] for write_out in (False, True))
    ours, theirs = (together(held) if stacked else held[0] for held in (sketched, matrices))
    near = nearest_kronecker(ours)
    assert isinstance(near.output, LowRank)
    assert isinstance(near.input, LowRank)
    residual, starts = draw(2, out, inner, seed=5), draw(2, out, inner, seed=6)
    if not stacked:
        residual, starts = residual[0], starts[0]
    applied, expected = (kronecker_preconditioner(held)(residual) for held in (ours, theirs))
    close(applied, expected, 1e-10)
    options = {"iterations": 10, "batched": stacked}
    for one, other in zip(
        conjugate_gradients(ours, starts, preconditioner=kronecker_preconditioner(ours), **options),
        conjugate_gradients(theirs, starts, preconditioner=kronecker_preconditioner(theirs), **options),
        strict=True,
    ):
        close(one.value, other.value, 1e-9)


def test_a_sketch_with_a_giant_direction_is_preconditioned_by_a_positive_map_in_float32():
    """As the inputs of a language model's first layers are: one direction a million times larger than the others."""
    spike = LowRank(draw(200, 1, seed=1) * 1e4, draw(200, seed=2) ** 2 * 1e-3)
    narrow = Kronecker(spike, spike).to("cpu", torch.float32)
    apply = kronecker_preconditioner(LinearSystem((narrow,), (torch.zeros(200, 200),)))
    direction = spike.factor / spike.factor.norm()
    for residual in (direction @ direction.T, direction @ draw(1, 200, seed=3), draw(200, 200, seed=4)):
        assert float((residual * apply(residual.float()).double()).sum()) > 0


def test_the_nearest_kronecker_product_is_the_term_itself_and_keeps_partial_traces():
    make = CURVATURES["kronecker"]
    for experts in ([make(1)], [make(1), make(1).scaled(3.0)], [make(1).scaled(0.0), make(1)]):
        system = match(experts, [draw(OUT, IN, seed=3)] * len(experts), WEIGHTS[: len(experts)])
        close(matrix(nearest_kronecker(system)), sum(dense(c) for c in system.curvatures), 1e-13)
    system = problem(make)
    near, blocks = nearest_kronecker(system), sum(dense(c) for c in system.curvatures).reshape(OUT, IN, OUT, IN)
    close(near.output * near.input.trace(), torch.einsum("aibi->ab", blocks), 1e-13)
    close(near.input * near.output.trace(), torch.einsum("aiaj->ij", blocks), 1e-13)
    assert nearest_kronecker(match([make(1).scaled(0.0)], [draw(OUT, IN, seed=3)], [1.0])) is None
    beside = match([make(1), Identity(0.7)], [draw(OUT, IN, seed=3)] * 2, [1.0, 1.0])
    near, whole = nearest_kronecker(beside), dense(make(1)) + 0.7 * torch.eye(OUT * IN).double()
    close(near.output * near.input.trace(), torch.einsum("aibi->ab", whole.reshape(OUT, IN, OUT, IN)), 1e-13)
    for name in ("gram", "low rank", "dense", "sum"):
        assert nearest_kronecker(match([make(1), CURVATURES[name](1)], [draw(OUT, IN, seed=3)] * 2, [1, 1])) is None
    for bad in (Kronecker(-psd(OUT, 1), psd(IN, 2)), make(1).scaled(float("inf"))):
        with pytest.raises(NumericalError, match="not positive semidefinite"):
            nearest_kronecker(match([bad], [draw(OUT, IN, seed=3)], [1.0]))


@pytest.mark.parametrize("rank", [12, 100])
def test_inputs_of_any_size_are_solved_alike(rank):
    """What an input ten thousand times smaller than another says is as accurate as what the large one says."""
    size = 64
    inputs = [draw(size, rank, seed=seed) * torch.logspace(0, -4, size).double()[:, None] for seed in range(3)]
    deltas, x0 = [draw(OUT, size, seed=10 + seed) for seed in range(3)], draw(OUT, size, seed=5)
    stored = match([Gram((X @ X.T).float()) for X in inputs], [delta.float() for delta in deltas], [1.0] * 3)
    right = sum((delta - x0) @ X @ X.T for X, delta in zip(inputs, deltas, strict=True))
    together = torch.cat(inputs, 1)
    expected = x0 + right @ torch.linalg.pinv(together @ together.T, rtol=1e-13, hermitian=True)
    weigh = together.norm(dim=1)
    close(exact(stored, x0.float()).value.double() * weigh, expected * weigh, 1e-3)


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_what_roundings_of_stored_curvatures_hide_is_not_solved_for(dtype, accuracy):
    """Inputs of any size, and directions that matter ever less; stored as correlations and a diagonal."""
    size = 64
    deltas, x0 = [draw(OUT, size, seed=50 + seed) for seed in range(3)], torch.zeros(OUT, size).double()
    root = torch.linalg.qr(draw(size, size, seed=0)).Q * torch.logspace(0, -4, size).double()
    A = (root @ root.T) * torch.outer(*[torch.logspace(0, -3, size).double()] * 2)
    sizes = A.diagonal().sqrt()
    rounded = (A / torch.outer(sizes, sizes)).to(dtype).double() * torch.outer(sizes, sizes)
    stored = [Gram((rounded * (1 + 0.2 * seed)).float()) for seed in range(3)]
    expected = sum((1 + 0.2 * seed) * delta for seed, delta in enumerate(deltas)) / 3.6
    found = exact(match(stored, [delta.float() for delta in deltas], [1.0] * 3, accuracy), x0.float()).value.double()
    assert float((found * sizes).norm()) < 1.6 * float((expected * sizes).norm())
    missed = found - expected
    assert float((missed @ A * missed).sum()) < 0.1 * float((expected @ A * expected).sum())


@pytest.mark.parametrize("rank", [5, 40])
def test_inputs_of_any_size_are_solved_alike_by_two_kronecker_products(rank):
    size = 16
    inputs = [draw(size, rank, seed=seed) * torch.logspace(0, -4, size).double()[:, None] for seed in range(2)]
    outputs = [psd(OUT, 30 + seed) for seed in range(2)]
    deltas, x0 = [draw(OUT, size, seed=10 + seed) for seed in range(2)], draw(OUT, size, seed=5)
    made = [Kronecker(B.float(), (X @ X.T).float()) for B, X in zip(outputs, inputs, strict=True)]
    terms = [torch.kron(B, X @ X.T) for B, X in zip(outputs, inputs, strict=True)]
    right = sum(term @ (delta - x0).reshape(-1) for term, delta in zip(terms, deltas, strict=True))
    expected = x0 + (torch.linalg.pinv(sum(terms), rtol=1e-13, hermitian=True) @ right).reshape(x0.shape)
    weigh = torch.cat(inputs, 1).norm(dim=1)
    close(
        exact(match(made, [d.float() for d in deltas], [1.0] * 2), x0.float()).value.double() * weigh,
        expected * weigh,
        1e-3,
    )


def test_tokens_that_never_came_are_solved_beside_frequent_ones():
    """As in tied embeddings: the counts of tokens say nothing of how accurate the Gram of the head is."""
    counts = torch.tensor([[1e8], [0.0], [1.0], [0.0]])
    made = [Sum((Diagonal(counts * (seed + 1)), Gram(psd(IN, seed).float()))) for seed in range(2)]
    deltas, x0 = [draw(OUT, IN, seed=10 + seed) for seed in range(2)], draw(OUT, IN, seed=5)
    found = exact(match(made, [delta.float() for delta in deltas], [1.0] * 2), x0.float()).value
    for row, count in enumerate(counts[:, 0].double()):
        own = [count * (seed + 1) * torch.eye(IN) + psd(IN, seed).float().double() for seed in range(2)]
        right = sum(A @ delta[row] for A, delta in zip(own, deltas, strict=True))
        close(found[row].double(), torch.linalg.solve(sum(own), right), 1e-5)


def test_two_kronecker_products_are_solved_to_the_last_digit():
    system = problem(CURVATURES["kronecker"], 2)
    assert exact(system, torch.zeros(OUT, IN, dtype=torch.float64)).residual < 1e-12


def test_what_is_no_curvature_is_refused():
    negative = Gram(-psd(IN, 1))
    system = LinearSystem((negative,), (draw(OUT, IN, seed=1),))
    with pytest.raises(NumericalError, match=r"negative curvature .* at iteration 1"):
        conjugate_gradient(system, draw(OUT, IN, seed=2), iterations=5)
    once = (Identity(-1.0), negative, Diagonal(-torch.ones(OUT, IN).double()), Dense(-psd(OUT * IN, 1)))
    once += (LowRank(draw(IN, 1, seed=1) / 100, -torch.ones(IN).double()),)
    mixed = Gram(torch.tensor([1.0, 2.0, -1.0, 3.0, 1.0], dtype=torch.float64).diag())
    for curvature in (*once, mixed, Kronecker(-psd(OUT, 1), psd(IN, 2)), Kronecker(psd(OUT, 1), -psd(IN, 2))):
        for solve in (SOLVERS["conjugate gradient"], exact):
            with pytest.raises(NumericalError, match="not positive semidefinite"):
                solve(LinearSystem((curvature,), (draw(OUT, IN, seed=1),)), draw(OUT, IN, seed=2))
    beside = torch.eye(IN).double()
    beside[0, 0], beside[0, 1], beside[1, 0] = 0, 1, 1
    with pytest.raises(NumericalError, match="not positive semidefinite"):
        exact(LinearSystem((Gram(beside),), (draw(OUT, IN, seed=1),)), draw(OUT, IN, seed=2))
    pair = (Kronecker(-psd(OUT, 1), psd(IN, 2)), Kronecker(psd(OUT, 3), psd(IN, 4)))
    system = LinearSystem(pair, (draw(OUT, IN, seed=1), draw(OUT, IN, seed=2)))
    for solve in SOLVERS.values():
        with pytest.raises(NumericalError, match="not positive semidefinite"):
            solve(system, draw(OUT, IN, seed=3))
    with pytest.raises(ValueError, match="no closed form"):
        exact(problem(CURVATURES["kronecker"], 3), torch.zeros(OUT, IN, dtype=torch.float64))
    with pytest.raises(ValueError, match="one of each per expert"):
        match([Identity()], [], [])
    with pytest.raises(ValueError, match="different shapes"):
        match([Identity()] * 2, [torch.ones(2), torch.ones(3)], [1, 1])


def test_float32_on_a_nearly_singular_system_stops_at_rounding_instead_of_running_away():
    curvatures = [
        Kronecker(psd(32, seed, rank=2), psd(48, seed + 9, rank=3)).to("cpu", torch.float32) for seed in range(3)
    ]
    deltas = [draw(32, 48, seed=20 + seed).float() for seed in range(3)]
    system = match(curvatures, deltas, [1.0] * 3)
    x0 = sum(deltas) / 3
    solution = conjugate_gradient(system, x0, iterations=5000)
    reference = LinearSystem(tuple(c.to("cpu", torch.float64) for c in curvatures), tuple(d.double() for d in deltas))
    settled = conjugate_gradient(reference, x0.double(), iterations=5000, tolerance=1e-6)
    assert solution.residual < 1e-3
    assert solution.value.norm() < 3 * settled.value.norm()


# Initializations -------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")
KEEPING = {
    "average": {},
    "task_arithmetic": {"scale": 1 / 3},
    "ties": {"density": 1.0, "scale": 1.0},
    "dare_ties": {"density": 1.0, "scale": 1.0, "fuse": "mean"},
    "della": {"density": 1.0, "epsilon": 0.0, "scale": 1.0, "fuse": "mean"},
    "breadcrumbs": {"density": 1.0, "outliers": 0.0, "scale": 1 / 3},
    "slerp": {},
    "model_stock": {},
    "knots": {"density": 1.0},
    "consensus": {"scale": 1 / 3},
}
"""Initializations with the options for which identical experts come back."""


def deltas_of(shape=(6, 7), count: int = 3) -> list[Tensor]:
    return [draw(*shape, seed=seed) for seed in range(count)]


def experts_for(initialize) -> int:
    return 2 if initialize is INITIALIZATIONS["slerp"] else 3


@pytest.mark.parametrize("initialize", INITIALIZATIONS.values(), ids=INITIALIZATIONS)
class TestEveryInitialization:
    def test_is_a_pure_function_that_keeps_shape_and_dtype(self, initialize):
        dtypes, shapes = (torch.float32, torch.float64, torch.bfloat16), ((6, 7), (5,), (2, 3, 4), (), (0, 3), (1, 1))
        count = experts_for(initialize)
        for dtype, shape in itertools.product(dtypes, shapes):
            deltas = [delta.to(dtype) for delta in deltas_of(shape, count)]
            before = [delta.clone() for delta in deltas]
            context = Context("key", NAMES[:count])
            first, second = (initialize(deltas, WEIGHTS[:count], context) for _ in range(2))
            assert torch.equal(first, second)
            assert first.isfinite().all()
            assert (first.shape, first.dtype) == (torch.Size(shape), dtype)
            assert all(torch.equal(a, b) for a, b in zip(deltas, before, strict=True))

    def test_does_not_depend_on_the_order_of_experts(self, initialize):
        count = experts_for(initialize)
        deltas = deltas_of(count=count)
        expected = initialize(deltas, WEIGHTS[:count], Context("key", NAMES[:count]))
        for order in itertools.permutations(range(count)):
            turned = initialize(
                [deltas[i] for i in order], [WEIGHTS[i] for i in order], Context("key", tuple(NAMES[i] for i in order))
            )
            close(turned, expected, 1e-12)

    def test_zero_task_vectors_stay_zero(self, initialize):
        count = experts_for(initialize)
        for shape in ((3, 3), (4,), (2, 3, 4)):
            zero = [torch.zeros(shape)] * count
            assert not initialize(zero, WEIGHTS[:count], Context("key", NAMES[:count])).any()

    def test_nothing_lands_outside_the_span_of_low_rank_task_vectors(self, initialize):
        """What no expert changes stays: rows and columns that are zero in every task vector, whatever the method."""
        count = experts_for(initialize)
        deltas = deltas_of((12, 10), count)
        for seed, delta in enumerate(deltas):
            delta[8:] = 0
            delta[:8, 7:] = 0
            delta[:8, :7] = draw(8, 2, seed=seed + 9) @ draw(2, 7, seed=seed + 20)
        merged = initialize(deltas, WEIGHTS[:count], Context("key", NAMES[:count]))
        assert merged[:8, :7].abs().max() > 0
        assert float(merged[8:].abs().max()) < 1e-12
        assert float(merged[:, 7:].abs().max()) < 1e-12


def test_one_expert_stays_as_it_is_where_the_definition_allows():
    delta = deltas_of()[0]
    options = {name: dict(values) for name, values in KEEPING.items()} | {"tsvm": {}}
    for name, values in options.items():
        used = {**values, "scale": 1.0} if "scale" in values else dict(values)
        used |= {"agreement": 1, "mask_scale": (1e-9,)} if name == "consensus" else {}
        close(INITIALIZATIONS[name]([delta], [1.0], Context("key", NAMES[:1]), **used), delta, 1e-12)


SPECTRAL = ("tsvm", "iso_c", "iso_cts", "knots")


@pytest.mark.parametrize("name", SPECTRAL)
def test_spectral_methods_see_matrices_as_the_model_multiplies_by_them(name):
    initialize, deltas = INITIALIZATIONS[name], deltas_of((6, 9))
    expected = initialize(deltas, WEIGHTS, Context())
    turned = initialize([delta.T.contiguous() for delta in deltas], WEIGHTS, Context(transposed=True))
    close(turned.T, expected, 1e-12)
    stacks = [torch.stack([delta, 2 * delta]) for delta in deltas]
    stacked = initialize(stacks, WEIGHTS, Context(stacked=True))
    close(stacked, torch.stack([expected, 2 * expected]), 1e-12)
    convolutions = [delta.reshape(6, 3, 3) for delta in deltas]
    close(initialize(convolutions, WEIGHTS, Context()), expected.reshape(6, 3, 3), 1e-12)
    vectors = [delta[0] for delta in deltas]
    close(initialize(vectors, WEIGHTS, Context()), INITIALIZATIONS["average"](vectors, WEIGHTS, Context()), 1e-12)


def test_iso_c_has_equal_singular_values_and_tsvm_orthogonal_directions():
    deltas = deltas_of((8, 8))
    values = torch.linalg.svdvals(INITIALIZATIONS["iso_c"](deltas, [1.0] * 3, Context()))
    close(values, torch.linalg.svdvals(sum(deltas)).mean().expand(8), 1e-12)
    values = torch.linalg.svdvals(INITIALIZATIONS["iso_cts"](deltas, [1.0] * 3, Context()))
    close(values, values.mean().expand(8), 1e-12)
    kept = torch.cat([torch.linalg.svdvals(delta)[:2] for delta in deltas]).sort(descending=True).values
    values = torch.linalg.svdvals(INITIALIZATIONS["tsvm"](deltas, [1.0] * 3, Context()))
    close(values[:6], kept, 1e-12)
    assert float(values[6:].max()) < 1e-12


def test_model_stock_and_slerp_by_hand():
    stock, slerp = INITIALIZATIONS["model_stock"], INITIALIZATIONS["slerp"]
    right, up = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    close(stock([right, up], [1, 1], Context()), torch.zeros(2), 1e-7)  # orthogonal: back to the base
    close(stock([right, right + up], [1, 1], Context()), torch.tensor([2.0, 1.0]) * 2 * 0.5**0.5 / (1 + 0.5**0.5), 1e-6)
    assert not stock([right, -right], [1, 1], Context()).any()
    middle = slerp([right, up], [1, 1], Context())
    close(middle, torch.tensor([2**0.5, 2**0.5]), 1e-6)
    close(slerp([right, up], [3, 1], Context()), 2 * torch.tensor([0.9238795, 0.3826834]), 1e-6)
    origin = torch.tensor([1.0, 1.0])  # it is the weights that are interpolated
    close(slerp([right, up], [1, 1], Context(origin=origin)), slerp([right + 1, up + 1], [1, 1], Context()) - 1, 1e-6)


def test_breadcrumbs_and_della_by_hand():
    delta = torch.tensor([[1.0, -2.0, 3.0, -4.0, 5.0, -6.0, 7.0, -8.0, 9.0, -10.0]])
    kept = INITIALIZATIONS["breadcrumbs"]([delta], [1.0], Context(), scale=1.0, density=0.6, outliers=0.1)
    assert kept.tolist() == [[0, 0, 0, -4, 5, -6, 7, -8, 9, 0]]
    ones, context = torch.arange(1.0, 1001).repeat(40, 1), Context("key", ("a",))
    della = INITIALIZATIONS["della"]([ones], [1.0], context, scale=1.0, density=0.5, epsilon=0.3)
    chance = (della != 0).float().mean(0)
    assert float(chance[:100].mean()) == pytest.approx(0.23, abs=0.03)
    assert float(chance[-100:].mean()) == pytest.approx(0.77, abs=0.03)
    close(della.mean(0).mean(), ones[0].mean(), 0.02)
    level = INITIALIZATIONS["della"]([ones], [1.0], context, scale=1.0, density=0.5, epsilon=0.0)
    assert torch.equal(level, INITIALIZATIONS["dare"]([ones], [1.0], context, scale=1.0, density=0.5))


@pytest.mark.parametrize("name", KEEPING)
def test_identical_experts_come_back(name):
    initialize, delta = INITIALIZATIONS[name], deltas_of()[0]
    count = experts_for(initialize)
    for weights in ([1.0] * count, WEIGHTS[:count]):
        if weights[-1] == 1.0 or KEEPING[name].get("scale") != 1 / 3:  # a sum, of which the scale above makes a mean
            close(initialize([delta] * count, weights, Context("key", NAMES[:count]), **KEEPING[name]), delta, 1e-12)


@pytest.mark.parametrize("name", [name for name, options in INITIALIZATION_OPTIONS.items() if options.signed])
def test_of_a_negative_weight_the_opposite_task_vector_is_added(name):
    initialize, deltas, context = INITIALIZATIONS[name], deltas_of((6, 9)), Context("key", NAMES)
    opposite = [deltas[0], -deltas[1], deltas[2]]
    expected = initialize([delta.clone() for delta in opposite], WEIGHTS, context)
    close(initialize(deltas, [WEIGHTS[0], -WEIGHTS[1], WEIGHTS[2]], context), expected, 1e-12)


def test_the_two_tables_of_initializations_agree():
    assert INITIALIZATIONS.keys() == INITIALIZATION_OPTIONS.keys()
    for name, function in INITIALIZATIONS.items():
        keywords = {
            p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
        }
        fields = {n: f.default for n, f in INITIALIZATION_OPTIONS[name].model_fields.items() if n != "method"}
        assert keywords == fields


def test_dare_draws_by_seed_expert_and_weight_and_keeps_the_mean():
    dare, ones = INITIALIZATIONS["dare"], [torch.ones(200, 200)]
    one = dare(ones, [1.0], Context("key", ("a",)), scale=1.0, density=0.25)
    assert set(one.unique().tolist()) == {0.0, 4.0}
    assert float(one.mean()) == pytest.approx(1.0, abs=0.05)
    for other in (Context("key2", ("a",)), Context("key", ("b",)), Context("key", ("a",), seed=1)):
        assert not torch.equal(dare(ones, [1.0], other, scale=1.0, density=0.25), one)
    assert torch.equal(dare(ones, [1.0], Context("key", ("a",)), scale=1.0, density=1.0), ones[0])
    deltas, context = deltas_of(), Context("key", NAMES)
    alone = [dare([d], [w], Context("key", (n,))) for d, w, n in zip(deltas, WEIGHTS, NAMES, strict=True)]
    close(dare(deltas, WEIGHTS, context), sum(alone), 1e-12)


def test_dare_draws_the_same_everywhere():
    """Written out: the draw depends neither on the processor nor on torch's default device."""
    ones, context = [torch.ones(32)], Context("key", ("a",))
    for device in ("cpu", "meta"):
        with torch.device(device):
            drawn = INITIALIZATIONS["dare"](ones, [1.0], context, scale=0.5)
        assert "".join(str(int(entry)) for entry in drawn) == "01001000000010001101101001011111"


def test_an_expert_of_no_weight_does_not_vote_in_ties():
    loud, quiet = torch.full((3,), -9.0), torch.full((3,), 1.0)
    merged = INITIALIZATIONS["ties"]([loud, quiet], [0.0, 1.0], Context("key", ("a", "b")), density=1.0)
    assert torch.equal(merged, quiet)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    density=st.floats(0.001, 1.0) | st.just(1.0),
    seed=st.integers(0, 10**6),
    coarse=st.sampled_from(["as drawn", "few values", "tiny", "zeros", torch.bfloat16, torch.float16, torch.float64]),
    guess=st.sampled_from(["none", "of the whole", "of a part", "far off", "near"]),
)
def test_the_streamed_threshold_is_the_exact_rank(sizes, density, seed, coarse, guess):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, generator=generator) for size in sizes]
    if isinstance(coarse, torch.dtype):
        parts = [part.to(coarse) for part in parts]
    elif coarse == "few values":
        parts = [part.round() for part in parts]
    elif coarse == "tiny":
        parts = [part * 1e-39 for part in parts]
    elif coarse == "zeros":
        parts = [torch.zeros_like(part) for part in parts]
    whole = torch.cat([part.float() for part in parts]).abs()
    guesses = {
        "none": None,
        "of the whole": whole,
        "of a part": parts[0],
        "far off": 1e3 * whole + 1,
        "near": 1.01 * whole,
    }
    rank = MagnitudeRank(density)
    if guesses[guess] is not None:
        rank.aim(guesses[guess])
    passes = 0
    while rank.value is None:
        passes += 1
        for part in parts:
            rank.add(part)
        rank.narrow()
    assert rank.value == float(whole.kthvalue(kept_rank(len(whole), density)).values)
    assert passes <= (3 if guesses[guess] is not None else 2)
    if guess == "of the whole" and 1 < kept_rank(len(whole), density) < len(whole):
        assert passes == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_the_streamed_threshold_keeps_the_fraction_asked_for_in_any_dtype(density, dtype):
    """Magnitudes are ranked in float32, whose rounding must not put an entry under its own threshold."""
    for seed in range(6):
        delta, rank = draw(50, seed=seed).to(dtype), MagnitudeRank(density)
        while rank.value is None:
            rank.add(delta)
            rank.narrow()
        merged = INITIALIZATIONS["ties"]([delta], [1.0], Context(thresholds=(rank.value,)), density=density)
        assert int((merged != 0).sum()) == 50 - kept_rank(50, density) + 1


@pytest.mark.parametrize("name", ["identity", "diagonal", "gram", "low rank", "kronecker", "dense", "sum"])
def test_damping_goes_from_the_solution_to_the_initialization(name):
    system, x0 = problem(CURVATURES[name], 2), draw(OUT, IN, seed=5)

    def damped(factor: float) -> LinearSystem:
        term = system.damping(factor, x0.shape)
        mean = float(sum(dense(c) for c in system.curvatures).diagonal().mean())
        assert term.scale == pytest.approx(factor * mean)
        return match([*system.curvatures, term], [*system.deltas, x0], [1.0] * 3)

    distances = []
    for factor in (1e-9, 0.1, 1.0, 1e9):
        made = damped(factor)
        solution = conjugate_gradient(made, x0, iterations=4000, tolerance=1e-13)
        close(solution.value, oracle(made, x0), 1e-6)
        distances.append(float((solution.value - x0).norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-6 * distances[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_curvatures_are_preconditioned_all_the_same(dtype):
    """Of ill-conditioned factors, whose smallest eigenvalues the rounding of storage turns negative."""
    size, eps = 60, torch.finfo(dtype).eps
    scale = torch.logspace(0, -2, size, dtype=torch.float64)

    def factor(seed: int) -> Tensor:
        rows = draw(12, size, seed=seed)
        gram = rows.T @ rows / 12
        root = gram.diagonal().sqrt()
        rounded = (gram / root / root[:, None]).to(dtype).double()
        rounded.fill_diagonal_(1)
        return rounded * scale * scale[:, None]

    curvatures = [Kronecker(factor(seed), factor(seed + 9)) for seed in range(3)]
    deltas = [draw(size, size, seed=20 + seed) for seed in range(3)]
    assert torch.linalg.eigvalsh(sum(c.input for c in curvatures))[0] < 0
    system = match(curvatures, deltas, [1.0] * 3, accuracy=eps)
    preconditioner = kronecker_preconditioner(system)
    x0 = sum(deltas) / 3
    run = conjugate_gradient(system, x0, iterations=5, preconditioner=preconditioner)
    assert run.residual < run.residuals[0]
    far = conjugate_gradient(system, x0, iterations=2000, preconditioner=preconditioner)
    assert far.outcome is Outcome.ROUNDING
    assert far.residual < run.residuals[0]
    with pytest.raises(NumericalError, match="negative curvature"):
        conjugate_gradient(match(curvatures, deltas, [1.0] * 3), x0, iterations=2000, preconditioner=preconditioner)
    with pytest.raises(NumericalError, match="not positive semidefinite"):
        kronecker_preconditioner(
            match([Kronecker(c.output, c.input - 0.01 * torch.eye(size)) for c in curvatures], deltas, [1.0] * 3)
        )
