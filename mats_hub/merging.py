"""The streaming loop: read one tensor of every model, merge it, write it, forget it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.checkpoint import TORCH_DTYPES, CheckpointWriter, parse_size
from mats_hub.errors import NumericalError
from mats_hub.initialization import INITIALIZATIONS, Context, MagnitudeRank
from mats_hub.linear_system import LinearSystem, match
from mats_hub.plan import Action, Entry, Plan
from mats_hub.progress import Progress, silent
from mats_hub.recipe import Solver, Ties
from mats_hub.report import TensorRecord
from mats_hub.solver import Solution, conjugate_gradient, exact, kronecker_preconditioner

Initialize = Callable[[list[Tensor], list[float], Context], Tensor]


def merge_tensors(
    plan: Plan, folder: Path, device: torch.device, metadata: dict[str, str], progress: Progress | None = None
) -> list[TensorRecord]:
    """Write the merged checkpoint of a plan without problems into `folder`.

    Memory holds one tensor of every model and its statistics at a time. Everything is computed in float32 and written in
    the dtype the recipe asks for.

    Returns:
        One record per tensor, in the order they were written, then those that are not written.

    Raises:
        NumericalError: a non-finite value in a model or in the result, or a curvature that is not PSD, naming the tensor.

    """
    entries = {entry.key: entry for entry in plan.entries}
    show = progress or silent
    context = make_context(plan, device, show)
    records = []
    with CheckpointWriter(folder, plan.written, parse_size(plan.recipe.output.max_shard_size), metadata) as writer:
        for key in show(writer.order, len(writer.order), f"merging ({plan.recipe.method})"):
            entry = entries.pop(key)
            tensor, record = _merge_entry(plan, entry, context, device)
            check_cast(tensor, plan.written[key].dtype, key)
            writer.write(key, tensor)
            records.append(record)
    return records + [TensorRecord(e.key, e.action, e.reason) for e in entries.values()]


def _merge_entry(plan: Plan, entry: Entry, context: Context, device: torch.device) -> tuple[Tensor, TensorRecord]:
    if entry.action not in (Action.SOLVE, Action.INITIALIZE):
        copied = check_finite(plan.reference.tensor(entry.key), "the base", entry.key)
        return copied, TensorRecord(entry.key, entry.action, entry.reason)
    origin, deltas = deltas_at(plan, entry.key, device)
    merged, record = merge_deltas(plan, entry, deltas, context)
    return origin + merged, record


def merge_deltas(
    plan: Plan, entry: Entry, deltas: list[Tensor], context: Context, oriented: bool = False
) -> tuple[Tensor, TensorRecord]:
    """Return the merged task vector of one tensor and its record.

    Args:
        plan: the merge.
        entry: the tensor.
        deltas: the experts' task vectors, in the stored shape, or with `oriented` in ``[out, in]``.
        context: the merge's context.
        oriented: whether `deltas` are ``[out, in]`` already.

    """
    weights = [expert.weight for expert in plan.experts]
    start = _initialize(plan)(deltas, weights, replace(context, key=entry.key))
    norms: dict[str, Any] = {
        "initialization_norm": _norm(start),
        "expert_norms": tuple(_norm(delta) for delta in deltas),
    }
    if entry.action is Action.INITIALIZE:
        return start, TensorRecord(entry.key, entry.action, entry.reason, solution_norm=_norm(start), **norms)
    solution = _solve_entry(plan, entry, deltas, weights, start, oriented)
    record = TensorRecord(
        entry.key,
        entry.action,
        entry.reason,
        str(solution.outcome),
        solution.iterations,
        solution.residuals,
        solution.residual,
        solution_norm=_norm(solution.value),
        step_norm=_norm(solution.value - start),
        **norms,
    )
    return solution.value, record


def _solve_entry(
    plan: Plan, entry: Entry, deltas: list[Tensor], weights: list[float], start: Tensor, oriented: bool
) -> Solution:
    options, solver = plan.recipe.curvature, plan.recipe.solver
    assert options is not None
    assert solver is not None
    curvatures = []
    transposed = False
    for statistics, parameter in zip(plan.statistics, entry.parameters, strict=True):
        assert statistics is not None
        curvatures.append(statistics.curvature(parameter, options, start.device))
        transposed = not oriented and options.kind != "fisher" and statistics.is_transposed(parameter)
    if transposed:  # Conv1D stores [in, out]; the mathematics is in [out, in]
        deltas, start = [delta.T for delta in deltas], start.T
    try:
        solution = solve(match(curvatures, deltas, weights), start, solver)
    except NumericalError as error:
        raise NumericalError(
            f"tensor {entry.key!r}: {error}. Measure the experts' statistics again, or take it out of the match with exclude"
        ) from None
    return replace(solution, value=solution.value.T) if transposed else solution


def solve(system: LinearSystem, start: Tensor, options: Solver) -> Solution:
    """Solve one weight's system as the recipe's solver options say."""
    if options.method == "exact":
        return exact(system, start)
    preconditioner = kronecker_preconditioner(system) if options.preconditioner == "kronecker" else None
    return conjugate_gradient(
        system, start, iterations=options.iterations, tolerance=options.tolerance, preconditioner=preconditioner
    )


def make_context(plan: Plan, device: torch.device, show: Progress) -> Context:
    """Return what initializations may depend on, for TIES with the thresholds of a first reading of all task vectors."""
    context = Context(experts=tuple(e.name for e in plan.experts), seed=plan.recipe.seed)
    if isinstance(plan.recipe.initialization, Ties) and plan.recipe.initialization.trim == "global":
        return replace(context, thresholds=_thresholds(plan, device, show))
    return context


def _initialize(plan: Plan) -> Initialize:
    options = plan.recipe.initialization.model_dump()
    return partial(INITIALIZATIONS[options.pop("method")], **options)


def deltas_at(plan: Plan, key: str, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return the origin (the base, or the experts' mean) and each expert's task vector from it, all float32.

    For a merge of adapters into an adapter the origin is zero: the base's weights are not needed and not read.
    """
    if plan.base is not None:
        if plan.recipe.output.format == "adapter":
            origin = torch.zeros(plan.base.headers[key].shape, device=device)
        else:
            origin = check_finite(plan.base.tensor(key).to(device, torch.float32), "the base", key)
        deltas = []
        for expert in plan.experts:
            delta = expert.delta(key, origin)
            dense = torch.zeros_like(origin) if delta is None else delta.dense(device)
            deltas.append(check_finite(dense, f"expert {expert.name!r}", key))
        return origin, deltas
    values = [
        check_finite(e.whole_tensor(e.names[key]).to(device, torch.float32), f"expert {e.name!r}", key)
        for e in plan.experts
    ]
    origin = torch.stack(values).mean(0) if len(values) > 1 else values[0]
    return origin, [value - origin for value in values]


def _thresholds(plan: Plan, device: torch.device, show: Progress) -> tuple[float, ...]:
    """Return each expert's global trimming threshold, from two passes over the task vectors."""
    assert isinstance(plan.recipe.initialization, Ties)
    keys = [entry.key for entry in plan.entries if entry.action in (Action.SOLVE, Action.INITIALIZE)]
    ranks = [MagnitudeRank(plan.recipe.initialization.density) for _ in plan.experts]
    for number in (1, 2):
        for key in show(keys, len(keys), f"magnitudes, pass {number} of 2"):
            _, deltas = deltas_at(plan, key, device)
            for expert, rank, delta in zip(plan.experts, ranks, deltas, strict=True):
                if expert.holds(key):  # what an adapter does not touch is no part of its task vector
                    rank.add(delta)
        if number == 1:
            for rank in ranks:
                rank.narrow()
    return tuple(rank.value() for rank in ranks)


def check_finite(tensor: Tensor, owner: str, key: str) -> Tensor:
    """Return the tensor, or raise `NumericalError` naming its owner when a value is not finite."""
    if not torch.isfinite(tensor).all():
        raise NumericalError(
            f"{owner} has a NaN or infinite value in tensor {key!r}; its training diverged or the file is damaged. "
            "Fetch it again or take another checkpoint"
        )
    return tensor


def check_cast(tensor: Tensor, dtype: str, key: str) -> None:
    """Raise `NumericalError` when the tensor does not stay finite in the dtype it is written in."""
    if tensor.is_floating_point() and not torch.isfinite(tensor.to(TORCH_DTYPES[dtype])).all():
        raise NumericalError(
            f"tensor {key!r} does not stay finite when it is written as {dtype} (largest magnitude "
            f"{float(tensor.abs().max()):.3g}); ask for a wider dtype (--dtype float32)"
        )


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
