"""Several recipes merged on one reading of the same experts, to be scored against each other."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mats_hub.checkpoint import CheckpointWriter, parse_size
from mats_hub.curvature import Curvature
from mats_hub.errors import MatsError, NumericalError
from mats_hub.initialization import Context
from mats_hub.matching import curvatures_at, merge_deltas
from mats_hub.merged_model import merge, write_surroundings
from mats_hub.plan import Action, Entry, Plan
from mats_hub.planning import make_plan
from mats_hub.progress import Progress, silent
from mats_hub.reading import check_cast, check_finite, deltas_at, over_tensors
from mats_hub.recipe import Recipe
from mats_hub.source import Source
from mats_hub.thresholds import thresholds

DISK_SHARE = 0.5
"""Of what is free, that candidates may take at a time."""


@dataclass(eq=False)
class Candidate:
    """One of several recipes for the same experts.

    Attributes:
        label: what it is called in tables.
        recipe: what to merge and how; what is on the Hub is pinned once it is planned.
        folder: where it is merged, while it is there.
        problem: why it cannot be merged; '' when it can.
        scores: task → score.

    """

    label: str
    recipe: Recipe
    folder: Path | None = None
    problem: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    plan: Plan | None = None


def merge_candidates(
    candidates: Sequence[Candidate],
    folder: Path,
    device: torch.device,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Iterator[Candidate]:
    """Merge candidates of the same experts, and hand out each with its folder, which is removed afterwards.

    Task vectors and statistics are read once for as many candidates as half of the free disk holds; recipes that differ in
    their number of conjugate-gradient steps alone are one run. Adapters that are merged into an adapter, which are small, are
    merged one after the other. Heads, configs and tokenizers are written as for any merge, cards are not.

    Args:
        candidates: what to merge; those that cannot be are handed out with their problem.
        folder: an empty one to work in.
        device: where to compute.
        token: Hub token.
        progress: wraps the iteration over tensors.

    """
    for candidate in candidates:
        try:
            candidate.plan = make_plan(candidate.recipe, token)
            candidate.plan.raise_problems()
            candidate.recipe = as_given(candidate.plan)
        except MatsError as error:
            candidate.problem = " ".join(str(error).split())
    able = [c for c in candidates if not c.problem]
    yield from (c for c in candidates if c.problem)
    together = [c for c in able if c.plan and c.plan.recipe.output.format == "full" and not _folds(c.plan)]
    for candidate in (c for c in able if c not in together):
        try:
            merged = merge(candidate.recipe, device=str(device), token=token, progress=progress)
            candidate.folder = merged.folder
        except NumericalError as error:
            candidate.problem = str(error)
        yield candidate
    while together:
        assert together[0].plan
        size = together[0].plan.disk_bytes
        count = max(1, int(DISK_SHARE * shutil.disk_usage(folder).free / max(size, 1)))
        batch, together = together[:count], together[count:]
        _merge_batch(batch, folder, device, progress or silent)
        for candidate in batch:
            yield candidate
            if candidate.folder:
                shutil.rmtree(candidate.folder, ignore_errors=True)


def _folds(plan: Plan) -> bool:
    from mats_hub.adapter import FoldedAdapter

    return any(isinstance(expert.adapter, FoldedAdapter) for expert in plan.experts)


def as_given(plan: Plan) -> Recipe:
    """Return a plan's recipe, what is on the Hub pinned, and what is in folders by the paths that it was given by."""

    def place(source: Source) -> str:
        return str(source.folder) if source.repo_id is None else source.public_spec

    paths = [str(s.path) if s and s.path and s.path.exists() else None for s in plan.statistics]
    experts = [
        entry.model_copy(
            update={"model": place(expert.source), "statistics": plan.statistics_at.get(expert.name) or path}
        )
        for entry, expert, path in zip(plan.recipe.experts, plan.experts, paths, strict=True)
    ]
    base = place(plan.base.source) if plan.base else None
    tokenizer = place(plan.companions[0]) if plan.recipe.tokenizer else None
    return plan.recipe.model_copy(update={"experts": tuple(experts), "base": base, "tokenizer": tokenizer})


@dataclass(eq=False)
class _Writing:
    candidate: Candidate
    plan: Plan
    entries: Mapping[str, Entry]
    context: Context
    writer: CheckpointWriter


def _merge_batch(batch: Sequence[Candidate], folder: Path, device: torch.device, show: Progress) -> None:
    plans = [c.plan for c in batch if c.plan]
    densities = {p.recipe.initialization.global_density for p in plans} - {None}
    cuts = thresholds(plans[0], sorted(d for d in densities if d is not None), device, show) if densities else {}
    writings = []
    for number, (candidate, plan) in enumerate(zip(batch, plans, strict=True)):
        candidate.folder = folder / f"candidate{number}"
        candidate.folder.mkdir()
        density = plan.recipe.initialization.global_density
        context = Context(
            experts=tuple(expert.name for expert in plan.experts),
            seed=plan.recipe.seed,
            thresholds=cuts[density] if density is not None else None,
        )
        writer = CheckpointWriter(candidate.folder, plan.written, parse_size(plan.recipe.output.max_shard_size), {})
        writings.append(_Writing(candidate, plan, {entry.key: entry for entry in plan.entries}, context, writer))
    order = list(plans[0].written)
    try:
        merge = partial(_merge_key, writings=writings, device=device)
        sizes = {key: max(w.plan.working_bytes(w.entries[key]) for w in writings) for key in order}
        merging = over_tensors(plans[0], order, sizes.__getitem__, device, merge)
        for _ in show(merging, len(order), f"merging {len(batch)} candidates"):
            pass
        for writing in writings:
            made = writing.candidate.folder
            assert made
            if writing.candidate.problem:
                writing.candidate.folder = None
                shutil.rmtree(made)
                continue
            writing.writer.finish()
            write_surroundings(writing.plan, made)
    finally:
        for writing in writings:
            writing.writer.close()


def _merge_key(key: str, writings: Sequence[_Writing], device: torch.device) -> None:
    """Read one tensor of every model, and merge it as each candidate says that has no problem."""
    read: tuple[Tensor, list[Tensor]] | None = None
    copied: Tensor | None = None
    curvatures: dict[str, list[Curvature]] = {}
    for family in _families([writing for writing in writings if not writing.candidate.problem]):
        first = max(family, key=lambda w: w.plan.recipe.solver.iterations if w.plan.recipe.solver else 0)
        entry = first.entries[key]
        if entry.action not in (Action.SOLVE, Action.INITIALIZE):
            copied = check_finite(first.plan.reference.tensor(key), "the base", key) if copied is None else copied
            _write(family, key, dict.fromkeys(range(len(family)), copied))
            continue
        read = read or deltas_at(first.plan, entry, device)
        origin, deltas = read
        try:
            known = None
            if entry.action is Action.SOLVE and first.plan.recipe.curvature:
                name = f"{first.plan.recipe.curvature!r} {entry.parameters}"
                if name not in curvatures and first.plan.recipe.curvature.kind != "task_vector":
                    curvatures[name] = curvatures_at(first.plan, entry, deltas)
                known = curvatures.get(name)
            steps = [w.plan.recipe.solver.iterations if w.plan.recipe.solver else 0 for w in family]
            context = replace(first.context, origin=origin)
            copies = [delta.clone() for delta in deltas]
            merged = merge_deltas(
                first.plan, entry, copies, context, stored=True, curvatures=known, iterates=sorted({*steps})
            )
            values = {i: origin + merged.iterates.get(step, merged.value) for i, step in enumerate(steps)}
            _write(family, key, values)
        except NumericalError as error:
            for writing in family:
                writing.candidate.problem = str(error)


def _write(family: list[_Writing], key: str, values: Mapping[int, Tensor]) -> None:
    for number, writing in enumerate(family):
        check_cast(values[number], writing.plan.written[key].dtype, key)
        writing.writer.write(key, values[number])


def _families(writings: Sequence[_Writing]) -> list[list[_Writing]]:
    """Return the candidates in groups that differ in the number of conjugate-gradient steps alone."""
    groups: dict[str, list[_Writing]] = {}
    for writing in writings:
        content = writing.plan.recipe.model_dump()
        if content["solver"] and content["solver"]["method"] == "cg":
            content["solver"].pop("iterations")
        groups.setdefault(repr(content), []).append(writing)
    return list(groups.values())
