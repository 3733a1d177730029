"""The match of one tensor: from the experts' task vectors to the merged one, alone or solved together with others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mats_hub.curvature import Curvature, restrict
from mats_hub.errors import NumericalError
from mats_hub.initialization import INITIALIZATIONS, Context
from mats_hub.linear_system import LinearSystem, match, together
from mats_hub.plan import MATRIX_KINDS, Action, Entry, Plan
from mats_hub.preconditioner import kronecker_preconditioner
from mats_hub.recipe import Solver
from mats_hub.report import TensorRecord
from mats_hub.solver import Solution, conjugate_gradient, conjugate_gradients, exact
from mats_hub.statistics.conditioning import conditioned_gram

Initialize = Callable[[list[Tensor], list[float], Context], Tensor]


@dataclass(frozen=True)
class Merged:
    """The merged task vector of one tensor.

    Attributes:
        value: the task vector.
        record: what is to be said of it.
        system: what it solves; None when nothing was solved.
        iterates: the task vectors after other numbers of steps, where they were asked for.

    """

    value: Tensor
    record: TensorRecord
    system: LinearSystem | None = None
    iterates: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """One tensor's system, ready to be solved.

    Attributes:
        entry: the tensor.
        start: the initialization, as the system's curvatures act on it.
        shape: the shape of the result.
        turned: whether the result is the transpose of what is solved for.
        record: what is to be said of it, as far as it is known.
        system: what is solved; None where the initialization is the result.
        lifted: tells of the solution how far it is from solving the system outside of the span that it was sought in.

    """

    entry: Entry
    start: Tensor
    shape: torch.Size
    turned: bool
    record: TensorRecord
    system: LinearSystem | None = None
    lifted: Callable[[Tensor], float] | None = None

    def merged(self, solution: Solution | None = None) -> Merged:
        """Return the result from what a solver returned."""
        if solution is None:
            return Merged(self.start, self.record)
        value = solution.value
        record = replace(
            self.record,
            outcome=str(solution.outcome),
            iterations=solution.iterations,
            residuals=solution.residuals,
            residual=solution.residual,
            solution_norm=norm(value),
            step_norm=norm(value - self.start),
            outside=self.lifted(value) if self.lifted else None,
        )
        kept = {step: self._as_stored(iterate) for step, iterate in solution.iterates.items()}
        return Merged(self._as_stored(value), record, self.system, kept)

    def _as_stored(self, tensor: Tensor) -> Tensor:
        return (tensor.mT if self.turned else tensor).reshape(self.shape)

    def unsolved(self, error: NumericalError) -> NumericalError:
        """Return a solver's error, naming the tensor."""
        return NumericalError(
            f"tensor {self.entry.key!r}: {error}. Measure the experts' statistics again, or take it out of the match "
            "with exclude"
        )


def prepare(
    plan: Plan,
    entry: Entry,
    deltas: list[Tensor],
    context: Context,
    stored: bool = False,
    basis: Tensor | None = None,
    width: int | None = None,
    curvatures: list[Curvature] | None = None,
) -> Match:
    """Initialize one tensor from the task vectors, and set up its system.

    Args:
        plan: the merge.
        entry: the tensor.
        deltas: the experts' task vectors, all of one shape: ``[out, in]``; with `basis`, coordinates.
        context: the merge's context.
        stored: whether `deltas` have the stored shape instead, perhaps ``[in, out]`` or a convolution's; so has the result then.
        basis: orthonormal columns ``[out, k]`` that the deltas are coordinates ``[k, in]`` in.
        width: how many inputs the weight has, where the deltas are coordinates in the span of fewer.
        curvatures: what `curvatures_at` returns, where that is known.

    """
    weights = [expert.weight for expert in plan.experts]
    turned = stored and entry.turned
    place = replace(context, key=entry.key, transposed=turned, stacked=entry.stacked and deltas[0].dim() == 3)
    start = initialization(plan)(deltas, weights, place)
    shape, size = start.shape, norm(start)
    norms: dict[str, Any] = {"initialization_norm": size, "expert_norms": tuple(norm(delta) for delta in deltas)}
    record = TensorRecord(entry.key, entry.action, entry.reason, solution_norm=size, **norms)
    if entry.action is Action.INITIALIZE:
        return Match(entry, start, shape, False, record)
    assert plan.recipe.solver is not None
    assert plan.recipe.curvature is not None
    if stored:
        *deltas, start = (_as_matrix(tensor, entry, plan) for tensor in (*deltas, start))
    whole = list(curvatures_at(plan, entry, deltas) if curvatures is None else curvatures)
    if plan.recipe.solver.damping:
        space = start.shape if basis is None else torch.Size((len(basis), *start.shape[1:]))
        # Directions outside of the span have no curvature, and count in the mean.
        factor = plan.recipe.solver.damping * (start.shape[-1] / width if width else 1)
        whole.append(match(whole, deltas, weights).damping(factor, space))
        deltas, weights = [*deltas, start], [*weights, 1.0]
    acting = whole if basis is None else [restrict(curvature, basis) for curvature in whole]
    measured = [] if plan.recipe.curvature.kind == "task_vector" else [s for s in plan.statistics if s]
    accuracy = max((statistics.accuracy for statistics in measured), default=0.0)
    lifted = None
    if basis is not None and plan.recipe.solver.subspace == "factors":
        lifted = partial(_outside, match(whole, [basis @ delta for delta in deltas], weights), basis)
    system = match(acting, deltas, weights, accuracy)
    return Match(entry, start, shape, stored and entry.transposed, record, system, lifted)


def merge_deltas(
    plan: Plan, entry: Entry, deltas: list[Tensor], context: Context, iterates: Sequence[int] = (), **options: Any
) -> Merged:
    """Merge the task vectors of one tensor; the arguments are those of `prepare`.

    `iterates` are numbers of conjugate-gradient steps whose results are wanted beside the last one.

    Raises:
        NumericalError: a curvature that is not finite or not PSD, naming the tensor.

    """
    return finish(plan, [prepare(plan, entry, deltas, context, **options)], iterates)[0]


def finish(plan: Plan, matches: Sequence[Match], iterates: Sequence[int] = ()) -> list[Merged]:
    """Solve several tensors' systems, all of one shape, as one where their curvatures stack.

    Raises:
        NumericalError: a curvature that is not finite or not PSD, naming the tensor.

    """
    options = plan.recipe.solver
    systems = [found.system for found in matches if found.system]
    if len(systems) > 1 and options and options.method == "cg":
        joint = together(systems)
        if joint is not None:
            start = torch.stack([found.start for found in matches])
            try:
                solutions = conjugate_gradients(joint, start, **_steps(joint, options), iterates=iterates)
            except NumericalError as error:
                raise matches[error.position].unsolved(error) from None
            return [found.merged(solution) for found, solution in zip(matches, solutions, strict=True)]
    made = []
    for found in matches:
        try:
            made.append(found.merged(solve(found.system, found.start, options, iterates) if found.system else None))
        except NumericalError as error:
            raise found.unsolved(error) from None
    return made


def solve(system: LinearSystem, start: Tensor, options: Solver | None, iterates: Sequence[int] = ()) -> Solution:
    """Solve one weight's system as the recipe's solver options say."""
    assert options is not None
    if options.method == "exact":
        return exact(system, start)
    return conjugate_gradient(system, start, **_steps(system, options), iterates=iterates)


def _steps(system: LinearSystem, options: Solver) -> dict[str, Any]:
    preconditioner = kronecker_preconditioner(system) if options.preconditioner == "kronecker" else None
    return {"iterations": options.iterations, "tolerance": options.tolerance, "preconditioner": preconditioner}


def _outside(lifted: LinearSystem, basis: Tensor, value: Tensor) -> float:
    return norm(lifted.residual(basis @ value)) / (norm(lifted.rhs) or 1.0)


def initialization(plan: Plan) -> Initialize:
    """Return the recipe's initialization with its options."""
    options = plan.recipe.initialization.model_dump()
    return partial(INITIALIZATIONS[options.pop("method")], **options)


def _as_matrix(tensor: Tensor, entry: Entry, plan: Plan) -> Tensor:
    """Return a tensor of the stored shape as curvatures of the recipe's kind act on it."""
    assert plan.recipe.curvature is not None
    if plan.recipe.curvature.kind not in MATRIX_KINDS or tensor.dim() < 2:
        return tensor
    if entry.transposed:
        return tensor.mT
    return tensor.flatten(1) if tensor.dim() > 2 and not entry.stacked else tensor


def curvatures_at(plan: Plan, entry: Entry, deltas: list[Tensor]) -> list[Curvature]:
    """Return each expert's curvature at one tensor, acting on ``[out, in]``: from its statistics, or from `deltas`."""
    options = plan.recipe.curvature
    assert options is not None
    if options.kind == "task_vector":
        return [conditioned_gram(delta.mT @ delta, options) for delta in deltas]
    found = []
    for statistics, parameter in zip(plan.statistics, entry.parameters, strict=True):
        assert statistics is not None
        found.append(statistics.curvature(parameter, options, deltas[0].device, deltas[0].dtype))
    return found


def norm(tensor: Tensor) -> float:
    """Return a tensor's Frobenius norm; of narrow dtypes it is computed in float32."""
    wide = torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None
    return float(torch.linalg.vector_norm(tensor, dtype=wide))
