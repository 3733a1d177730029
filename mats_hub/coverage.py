"""Which tensors each expert's statistics cover, and whether the statistics are the expert's own."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path

from mats_hub.architecture import align, describe
from mats_hub.errors import MatsError, StatisticsMismatch
from mats_hub.expert import Expert
from mats_hub.methods import ADAPTERS, FULL, NO_BASE
from mats_hub.plan import MATRIX_KINDS, Action, Plan
from mats_hub.recipe import STATISTICS_KINDS, ExpertEntry
from mats_hub.source import open_source
from mats_hub.statistics.file import Statistics
from mats_hub.statistics.remote import find_statistics, statistics_in


def open_statistics(plan: Plan, token: str | bool | None) -> None:
    """Find each expert's statistics, check that they belong to it, and settle method ``auto``."""
    recipe = plan.recipe
    data_free = recipe.curvature is None or recipe.curvature.kind not in STATISTICS_KINDS
    wanted = recipe.method == "auto" or not data_free
    for entry, expert in zip(recipe.experts, plan.experts, strict=True):
        statistics = None
        try:
            statistics = _statistics_of(plan, entry, expert, token) if wanted else None
            if statistics:
                statistics.check_expert(expert.name, expert.source.fingerprint, expert.source.public_spec)
        except MatsError as error:
            plan.problems.append(error)
        plan.statistics.append(statistics)
    held = [statistics for statistics in plan.statistics if statistics]
    kinds = [kind for kind in STATISTICS_KINDS if held and all(statistics.covers(kind) for statistics in held)]
    if recipe.method == "auto":
        facts = set(kinds) if len(held) == len(plan.experts) else set()
        facts.add(NO_BASE if plan.base is None else ADAPTERS if any(e.adapter for e in plan.experts) else FULL)
        plan.recipe, because = recipe.resolve(facts)
        lacking = [e.name for e, s in zip(plan.experts, plan.statistics, strict=True) if s is None]
        some = f" (none for {', '.join(lacking)})" if lacking and held else ""
        plan.notes.append(f"no method was named: {plan.recipe.method} is used, because {because}{some}")
        return
    if recipe.curvature is None or data_free:
        return
    for expert, statistics in zip(plan.experts, plan.statistics, strict=True):
        if statistics is None or not statistics.covers(recipe.curvature.kind):
            has = f"statistics of kind {', '.join(statistics.provenance.kinds)} only" if statistics else "no statistics"
            plan.problems.append(
                StatisticsMismatch(
                    f"expert {expert.name!r} has {has}, and method {recipe.method!r} needs kind {recipe.curvature.kind!r}. "
                    f"Measure them with 'mats-hub statistics {expert.source.spec} --kind {recipe.curvature.kind} --dataset …', "
                    "or take a method that needs none (ties, task_arithmetic)"
                )
            )


def _statistics_of(plan: Plan, entry: ExpertEntry, expert: Expert, token: str | bool | None) -> Statistics | None:
    if entry.statistics is None:
        found, where = find_statistics(expert.source)
        if found and where != expert.source.public_spec:
            plan.notes.append(f"the statistics of expert {expert.name!r} are those in {where}")
            plan.statistics_at[expert.name] = where
        return found
    path = Path(entry.statistics).expanduser()
    if path.is_file() or path.suffix in (".safetensors", ".json"):
        return Statistics.load(path)
    source = open_source(entry.statistics, token)
    found = statistics_in(source)
    plan.statistics_at[expert.name] = source.public_spec
    if found is None:
        raise StatisticsMismatch(
            f"expert {expert.name!r}: there are no statistics in {entry.statistics!r}; push them there"
        )
    return found


def coverage_of(plan: Plan) -> list[dict[str, str]]:
    """Return for each expert: reference tensor → its parameter's name in the statistics."""
    if plan.recipe.curvature is None:
        return [{} for _ in plan.experts]
    kind, parameters, found = plan.recipe.curvature.kind, plan.recipe.curvature.parameters, []
    if kind == "task_vector":
        known, headers = describe(plan.reference.config).linear, plan.reference.headers
        linear = align(known, headers).values() if known else headers
        return [{key: key for key in linear if len(headers[key].shape) == 2} for _ in plan.experts]
    facts = describe(plan.reference.config)
    stored_names = facts.stored_names
    # What a checkpoint stores as one, or in another form.
    otherwise = {piece.parameter for made in facts.pieces.values() for piece in made} | facts.shapes.keys()
    for expert, statistics in zip(plan.experts, plan.statistics, strict=True):
        covered = statistics.covers(kind, parameters) if statistics else {}
        # Of a part that was measured alone: other parts may have modules of the same names.
        alone = expert.part and not covered.keys() & plan.reference.headers.keys()
        held: Collection[str] = expert.part.values() if alone else plan.reference.headers
        names = align(covered, held, {**expert.architecture.stored_names, **stored_names})
        # A tied weight may be measured under a name that a checkpoint does not have.
        tied = {
            alias: name for alias, name in expert.architecture.tied.items() if alias in covered and alias not in names
        }
        stored = align(tied.values(), plan.reference.headers, stored_names)
        names |= {alias: stored[name] for alias, name in tied.items() if name in stored}
        strangers = [name for name in covered if not (name in names or name in expert.extra or name in otherwise)]
        if strangers and not expert.adapter:
            plan.problems.append(
                StatisticsMismatch(
                    f"expert {expert.name!r}: its statistics are of {len(strangers)} parameters that neither it nor "
                    f"{plan.reference.source.spec!r} has, such as {strangers[0]!r}; they were measured on another model"
                )
            )
        found.append({target: name for name, target in names.items()})
    return found


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a weight as the matrix it multiplies by: a convolution's ``[out, in · kernel]``."""
    return shape if len(shape) < 3 else (shape[0], math.prod(shape[1:]))


def decide_solvable(
    plan: Plan, coverage: Sequence[dict[str, str]], key: str, transposed: Collection[str]
) -> tuple[Action, str, tuple[str, ...]]:
    """Tell whether every expert's statistics cover a tensor; report those that cover it for some only, or misfit it."""
    assert plan.recipe.curvature is not None
    kind = plan.recipe.curvature.kind
    if kind == "task_vector":
        if key in coverage[0]:
            return Action.SOLVE, "Grams of the task vectors", ()
        return Action.INITIALIZE, "no weight of a linear module", ()
    if None in plan.statistics:
        return Action.INITIALIZE, "statistics are missing", ()
    holders = [names.get(key) for names in coverage]
    found = [name for name in holders if name is not None]
    if not found:
        return Action.INITIALIZE, _why_not(plan, key), ()
    if len(found) < len(holders):
        lacking = [e.name for e, name in zip(plan.experts, holders, strict=True) if name is None]
        if plan.recipe.unmatched == "error":
            everything = " --modules all" if any(expert.adapter for expert in plan.experts) else ""
            plan.problems.append(
                StatisticsMismatch(
                    f"expert {lacking[0]!r} has no {kind} statistics for {key!r}, which other experts have; measure them again "
                    f"with 'mats-hub statistics{everything}', or pass --unmatched initialize"
                )
            )
        return Action.INITIALIZE, f"no statistics of {', '.join(lacking)}", ()
    shape = plan.reference.headers[key].shape
    for expert, statistics, name in zip(plan.experts, plan.statistics, found, strict=True):
        assert statistics is not None
        acts_on = statistics.covers(kind)[name]
        turned = kind in MATRIX_KINDS and (statistics.is_transposed(name) or (len(shape) == 3 and key in transposed))
        stored = (*acts_on[:-2], *acts_on[:-3:-1]) if turned else acts_on
        if kind == "block_fisher":
            stored = (acts_on[0],) if len(acts_on) == 2 else acts_on
            fits = acts_on == (math.prod(shape),) * 2
        else:
            acted = matrix_shape(shape) if len(acts_on) < len(shape) else shape
            fits = len(stored) == len(acted) and all(a in (0, b) for a, b in zip(stored, acted, strict=True))
        if not fits:
            plan.problems.append(
                StatisticsMismatch(
                    f"expert {expert.name!r}: its statistics act on {stored} at {key!r}, whose shape is {shape}; "
                    "they were measured on another model"
                )
            )
    return Action.SOLVE, f"{kind} curvature of every expert", tuple(found)


def _why_not(plan: Plan, key: str) -> str:
    """Return why no expert's statistics have a curvature for a tensor."""
    assert plan.recipe.curvature is not None
    kind, wanted = plan.recipe.curvature.kind, plan.recipe.curvature.parameters
    for expert, statistics in zip(plan.experts, plan.statistics, strict=True):
        own = expert.names.get(key)
        uses = [use for use, _ in (statistics.uses if statistics else {}).get(own or "", ())]
        if kind in MATRIX_KINDS and uses and not set(uses) <= set(wanted):
            return f"the recipe does not match parameters of kind {' and '.join(uses)}"
    return f"no expert's statistics have a {kind} curvature for it"
