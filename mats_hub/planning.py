"""Making the plan, from configs and headers alone: every refusal that they can show, all problems at once.

No weight is read here, but for the fingerprint of a local folder when statistics or a pinned recipe ask for it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch

from mats_hub.adapter_planning import settle_format, with_origins
from mats_hub.architecture import Architecture, align, describe, layer_pattern
from mats_hub.base import open_base
from mats_hub.companion_choice import choose_companions
from mats_hub.coverage import coverage_of, decide_solvable, open_statistics
from mats_hub.errors import IncompatibleExperts, MatsError, RecipeError
from mats_hub.expert import Expert
from mats_hub.method_checks import method_problems
from mats_hub.plan import MATRIX_KINDS, Action, Entry, Plan
from mats_hub.recipe import NAME_PATTERN, Recipe
from mats_hub.source import open_source
from mats_hub.threads import in_threads, workers
from mats_hub.vocabulary import Vocabulary, tell_config_differences


def make_plan(recipe: Recipe, token: str | bool | None = None, stream: bool = False) -> Plan:
    """Return the plan of a recipe; its problems are listed in it, not raised.

    Args:
        recipe: what to merge and how.
        token: Hub token; the one stored on this machine otherwise.
        stream: whether weights that are not on this machine are to be read by range, and never stored.

    """
    plan = Plan(recipe, streamed=stream)
    _open_experts(plan, token)
    settle_format(plan)
    open_base(plan, token)
    if plan.problems or not plan.experts:
        return plan
    reference = plan.reference
    for expert in plan.experts:
        try:
            expert.align_to(reference)
            if plan.recipe.output.format == "full":
                expert.name_as_stored(reference)
        except MatsError as error:
            plan.problems.append(error)
    if not plan.problems:
        _check_structure(plan)
    structure = not plan.problems
    open_statistics(plan, token)
    plan.problems.extend(method_problems(plan))
    if structure:
        _fill_entries(plan)
    plan.recipe = _pinned(plan)
    return plan


def _open_experts(plan: Plan, token: str | bool | None) -> None:
    for entry in plan.recipe.experts:
        try:
            source = open_source(entry.model, token, plan.streamed)
            expert = Expert(source, entry.name or source.name, entry.weight)
            if not re.fullmatch(NAME_PATTERN, expert.name):
                raise RecipeError(f"{entry.model!r}: {expert.name!r} cannot be a task's name; give it one (--name)")
            if entry.sha256 and entry.sha256 != source.fingerprint:
                raise IncompatibleExperts(
                    f"expert {expert.name!r}: its weights have fingerprint {source.fingerprint[:12]}, but the recipe was made "
                    f"with {entry.sha256[:12]}; use those weights, or drop 'sha256' from the recipe"
                )
            plan.experts.append(expert)
        except MatsError as error:
            plan.problems.append(error)
    repeated = [name for name, count in Counter(e.name for e in plan.experts).items() if count > 1]
    for name in repeated:
        plan.problems.append(
            RecipeError(
                f"two experts are called {name!r}; give each entry of 'experts' its own 'name' (or --name on the command line)"
            )
        )


def _check_structure(plan: Plan) -> None:
    """Refuse experts that are not the same network as the reference."""
    reference = plan.reference
    kind = reference.config.get("model_type")
    layers = {layer_pattern(key) for key in reference.headers if layer_pattern(key) != key}
    for expert in plan.experts:
        own_kind = expert.config.get("model_type")
        if kind and own_kind and kind != own_kind and not expert.part:
            plan.problems.append(
                IncompatibleExperts(
                    f"expert {expert.name!r} is a {own_kind} model, but {reference.source.spec!r} is a {kind}; "
                    "only fine-tuned versions of one base can be merged"
                )
            )
            continue
        if not expert.names:
            plan.problems.append(
                IncompatibleExperts(
                    f"expert {expert.name!r} shares no tensor name with {reference.source.spec!r}; is it another architecture?"
                )
            )
            continue
        beyond = [own for own in expert.extra if layer_pattern(_in_reference(expert, own)) in layers]
        lacking = []
        if not expert.adapter:
            own_layers = layers & {layer_pattern(key) for key in expert.names}
            lacking = [key for key in reference.headers if key not in expert.names and layer_pattern(key) in own_layers]
        if beyond or lacking:
            example = f"it has {beyond[0]!r}, which the other lacks" if beyond else f"it lacks {lacking[0]!r}"
            plan.problems.append(
                IncompatibleExperts(
                    f"expert {expert.name!r} has another number of layers than {reference.source.spec!r}: {example} "
                    f"({len(beyond) + len(lacking)} such tensors); only fine-tuned versions of one base can be merged"
                )
            )


def _in_reference(expert: Expert, own: str) -> str:
    """Return how the reference would call an expert's tensor that it does not have."""
    for target, name in expert.names.items():
        if name.endswith(target) and name != target:
            return own.removeprefix(name[: -len(target)])
        if target.endswith(name) and name != target:
            return target[: -len(name)] + own
        break
    return own


def _fill_entries(plan: Plan) -> None:
    reference, recipe = plan.reference, plan.recipe
    architecture = describe(reference.config)
    heads, vocabulary = _HeadRule(plan, architecture), Vocabulary(plan)
    tell_config_differences(plan)
    coverage = coverage_of(plan)
    transposed = set(align(architecture.transposed, reference.headers, architecture.stored_names).values())
    stacks = align(architecture.stacked, reference.headers, architecture.stored_names)
    transposed |= {target for name, target in stacks.items() if architecture.stacked[name][1]}
    stacked = set(stacks.values())
    plan.kept = {expert.name: _kept_extra(plan, expert) for expert in plan.experts}
    misfits: dict[str, list[str]] = {}
    for key, header in reference.headers.items():
        action, reason = _decide(plan, architecture, heads, vocabulary, key, misfits)
        parameters: tuple[str, ...] = ()
        if action is Action.INITIALIZE and recipe.curvature and not plan.has_rows(key):
            action, reason, parameters = decide_solvable(plan, coverage, key, transposed)
        if action is Action.KEEP:
            _keep(plan, key)
        matrices = recipe.curvature is not None and recipe.curvature.kind in MATRIX_KINDS
        measured = [(s, name) for s, name in zip(plan.statistics, parameters, strict=False) if s and matrices]
        turned = key in transposed
        solved_turned = (turned and matrices) or any(s.is_transposed(name) for s, name in measured)
        on_inputs = all(s.acts_on_inputs(name) for s, name in measured)
        origin = key if plan.base_weights else None
        plan.entries.append(
            Entry(key, action, reason, header, parameters, turned, solved_turned, key in stacked, on_inputs, origin)
        )
    if recipe.output.format == "adapter":
        plan.entries = with_origins(plan)
    else:
        _refuse_parted(plan, architecture)
    if recipe.curvature and not plan.problems and not any(entry.action is Action.SOLVE for entry in plan.entries):
        reasons = Counter(entry.reason for entry in plan.merged_entries)
        why = reasons.most_common(1)[0][0] if reasons else "nothing is merged"
        plan.problems.append(
            RecipeError(
                f"a curvature of kind {recipe.curvature.kind!r} acts on none of the tensors that are merged ({why}); choose "
                "another kind (--curvature), or a method that needs none (ties, task_arithmetic)"
            )
        )
    vocabulary.refuse()
    plan.companions = choose_companions(plan, vocabulary.names)
    for name, clashes in misfits.items():
        more = f" and {len(clashes) - 1} more" if len(clashes) > 1 else ""
        plan.problems.append(
            IncompatibleExperts(
                f"expert {name!r} does not have the shapes of {reference.source.spec!r}: {clashes[0]}{more}. "
                "Only fine-tuned versions of one base can be merged; leave a tensor out with exclude (--exclude 'PATTERN'), "
                "which takes it from the base, or keep it per expert with keep_per_task (--keep-per-task 'PATTERN')"
            )
        )


def _refuse_parted(plan: Plan, architecture: Architecture) -> None:
    """Refuse adapters that hold one of two tied weights whole: in the expert they differ, in a full checkpoint they cannot."""
    for expert in plan.experts:
        if not expert.adapter or expert.adapter.options.get("ensure_weight_tying"):
            continue
        held = [expert.names.get(key, key) for key in (*architecture.tied, *architecture.tied.values())]
        for own in dict.fromkeys(name for name in held if name in expert.adapter.saved):
            plan.problems.append(
                IncompatibleExperts(
                    f"adapter {expert.name!r} holds {own!r} whole, which its base has tied to another weight, so that the two "
                    "differ in the expert; a full checkpoint cannot have that. Write an adapter (--format adapter)"
                )
            )


def _keep(plan: Plan, key: str) -> None:
    """Put the experts' own versions of a tensor into their tasks' heads; refuse what an expert does not hold whole."""
    for expert in plan.experts:
        if expert.holds(key) and expert.names[key] in expert.whole:
            plan.kept[expert.name].append(expert.names[key])
        elif expert.holds(key):
            plan.problems.append(
                RecipeError(
                    f"{key!r} is to be kept per task, but expert {expert.name!r}, a {expert.kind}, holds a change of it and not "
                    "the tensor itself; merge it, or leave it out with exclude (--exclude)"
                )
            )


class _HeadRule:
    """Which tensors belong to heads that differ between the experts, and so are kept per task."""

    def __init__(self, plan: Plan, architecture: Architecture) -> None:
        self._prefix = architecture.prefix
        maps = [expert.config.get("id2label") for expert in plan.experts]
        counts = [_label_count(expert) for expert in plan.experts]
        self.labels_differ = any(m != maps[0] for m in maps[1:]) or any(c != counts[0] for c in counts[1:])

    def is_head(self, key: str) -> bool:
        """Tell whether a reference tensor lies outside the body."""
        return bool(self._prefix) and not key.startswith(self._prefix)


def _label_count(expert: Expert) -> object:
    config = expert.config
    return config.get("num_labels") or len(config.get("id2label") or ()) or None


def _decide(
    plan: Plan,
    architecture: Architecture,
    heads: _HeadRule,
    vocabulary: Vocabulary,
    key: str,
    misfits: dict[str, list[str]],
) -> tuple[Action, str]:
    recipe, header = plan.recipe, plan.reference.headers[key]
    if recipe.output.format == "full" and architecture.tied.get(key) in plan.reference.headers:
        return Action.TIED, f"shares the weight of {architecture.tied[key]}"
    if not header.is_float:
        return Action.COPY, "not real numbers"
    if _matches(key, recipe.exclude) or (recipe.include and not _matches(key, recipe.include)):
        return Action.COPY, "left out by the recipe"
    if _matches(key, recipe.keep_per_task):
        return Action.KEEP, "kept per task by the recipe"
    holders = [expert for expert in plan.experts if expert.holds(key)]
    if not holders:
        return Action.COPY, "no expert changes it"
    if any(not (expert.holds(key) or expert.adapter or expert.part) for expert in plan.experts):
        return Action.KEEP, "not every expert has it"
    if heads.is_head(key) and heads.labels_differ:
        return Action.KEEP, "the experts' labels differ"
    if vocabulary.differs(key):
        said = vocabulary.settle(key)
        return (
            (Action.INITIALIZE, said) if said else (Action.COPY, "the experts' vocabularies differ; the base's is kept")
        )
    other = [expert for expert in holders if expert.shape(expert.names[key]) != header.shape]
    if other and heads.is_head(key):
        return Action.KEEP, "its shape differs between experts"
    for expert in other:
        shape = expert.shape(expert.names[key])
        misfits.setdefault(expert.name, []).append(f"{key!r} is {shape} and should be {header.shape}")
    return Action.INITIALIZE, "no curvature is used"


def _kept_extra(plan: Plan, expert: Expert) -> list[str]:
    kept = []
    for own in expert.extra:
        if expert.adapter and own in expert.adapter.changed:
            base, other = plan.reference.source.spec, describe(plan.reference.config).tied.get(own)
            why = (
                f"{base!r} stores once with {other!r}, and from which it would then differ; merge"
                if other
                else f"{base!r} does not have; is it an adapter of another base? If that base stores several weights of its "
                "model as one, merge"
            )
            plan.problems.append(
                IncompatibleExperts(
                    f"adapter {expert.name!r} changes {own!r}, which {why} its adapters into an adapter (--format adapter)"
                )
            )
        elif expert.checkpoint.headers[expert.whole[own]].is_float:
            kept.append(own)
    return kept


def _pinned(plan: Plan) -> Recipe:
    """Return the recipe with every id pinned to its commit and every folder called by its last part."""
    if len(plan.experts) != len(plan.recipe.experts):
        return plan.recipe
    local = [expert.source for expert in plan.experts if not expert.source.repo_id]
    list(
        in_threads(lambda source: source.fingerprint, local, workers(torch.device("cpu")))
    )  # at once; each keeps its own
    experts = []
    for entry, expert in zip(plan.recipe.experts, plan.experts, strict=True):
        changes = {
            "model": expert.source.public_spec,
            "name": expert.name,
            "statistics": plan.statistics_at.get(expert.name) or _public_name(entry.statistics),
        }
        if not expert.source.repo_id:
            changes["sha256"] = expert.source.fingerprint
        experts.append(entry.model_copy(update=changes))
    base = plan.base.source.public_spec if plan.base else None
    tokenizer = plan.companions[0].public_spec if plan.recipe.tokenizer and plan.companions else plan.recipe.tokenizer
    return plan.recipe.model_copy(update={"base": base, "experts": tuple(experts), "tokenizer": tokenizer})


def _public_name(path: str | None) -> str | None:
    return re.split(r"[/\\]", path)[-1] if path and path.endswith(".safetensors") else path


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
