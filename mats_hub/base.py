"""Opening the base of a merge, and telling whether it is the one the adapters were trained on."""

from __future__ import annotations

import re

from mats_hub.adapter_planning import outline
from mats_hub.checkpoint import Checkpoint
from mats_hub.errors import IncompatibleExperts, MatsError, RecipeError
from mats_hub.expert import Expert
from mats_hub.hub_id import is_hub_id
from mats_hub.plan import Plan
from mats_hub.source import Source, open_source


def open_base(plan: Plan, token: str | bool | None) -> None:
    """Open the base: the recipe's, else the one the adapters name; check that all adapters agree on it."""
    adapters = [(expert, expert.adapter) for expert in plan.experts if expert.adapter]
    spec = plan.recipe.base or next((adapter.base for _, adapter in adapters if adapter.base), None)
    if spec is None:
        if adapters:
            plan.problems.append(
                RecipeError(
                    f"adapter {adapters[0][0].source.spec!r} does not name its base; name it with 'base' (--base)"
                )
            )
        elif told := named_by_cards(plan):
            plan.notes.append(
                f"no base was given; the experts' cards name {told!r}, which methods of task vectors need (--base)"
            )
        return
    try:
        source = open_source(spec, token, plan.streamed)
        if plan.recipe.output.format == "adapter":
            plan.base = outline(plan, source)
        else:
            plan.base = plan.base_weights = Checkpoint(source)
    except MatsError as error:
        plan.problems.append(error)
        return
    if plan.recipe.allow_other_base:
        return
    named: dict[str, Expert] = {}
    for expert, adapter in adapters:
        if adapter.base:
            named.setdefault(adapter.base.partition("@")[0], expert)
    if len({name.lower() for name in named}) > 1:
        (one, first), (other, second) = list(named.items())[:2]
        plan.problems.append(
            IncompatibleExperts(
                f"adapter {first.source.spec!r} was trained on base {one!r}, but adapter {second.source.spec!r} on {other!r}; "
                "task vectors of different bases cannot be merged. If one is a mirror of the other, set "
                "allow_other_base: true (--allow-other-base)"
            )
        )
    for name, expert in named.items():
        if not _same_base(name, source):
            plan.problems.append(
                IncompatibleExperts(
                    f"adapter {expert.source.spec!r} was trained on base {name!r}, but the merge's base is {spec!r}. Leave "
                    "'base' out, or, if it is a mirror of the same weights, set allow_other_base: true (--allow-other-base)"
                )
            )
    for expert, adapter in adapters:
        revision = adapter.options.get("revision")
        if revision and source.repo_id and _same_base(adapter.base.partition("@")[0], source):
            _check_revision(plan, expert, f"{source.hub_id}@{revision}", token)


def named_by_cards(plan: Plan) -> str:
    """Return the one base that the cards of all experts name; '' where they name none, several or different ones."""
    try:
        stated = [expert.source.front_matter.get("base_model") for expert in plan.experts]
    except MatsError:  # a hint is not worth an error
        return ""
    names = {str(base[0] if isinstance(base, list) and len(base) == 1 else base or "") for base in stated}
    name = names.pop() if len(names) == 1 else ""
    return name if is_hub_id(name) else ""


def _check_revision(plan: Plan, expert: Expert, spec: str, token: str | bool | None) -> None:
    """Refuse an adapter that was trained on another commit of the base."""
    assert plan.base is not None
    base, revision = plan.base.source, spec.partition("@")[2]
    try:
        commit = revision if re.fullmatch("[0-9a-f]{40}", revision) else open_source(spec, token).commit
    except MatsError as error:
        plan.problems.append(error)
        return
    if commit != base.commit:
        plan.problems.append(
            IncompatibleExperts(
                f"adapter {expert.source.spec!r} was trained on {spec!r} (commit {str(commit)[:12]}), but the merge's base is "
                f"commit {str(base.commit)[:12]}. Name that commit as the base (--base {spec}), or, if the weights are the "
                "same, set allow_other_base: true (--allow-other-base)"
            )
        )


def _same_base(name: str, base: Source) -> bool:
    """Tell whether an adapter's base can be this one; a folder is believed unless the name is another folder here."""
    if base.hub_id:
        return name.lower() == base.hub_id.lower()
    try:
        other = open_source(name) if re.search(r"[/\\]", name) and name.startswith(("/", ".", "~")) else None
    except MatsError:
        return True
    if other is None or other.folder is None or (base.folder and other.folder.resolve() == base.folder.resolve()):
        return True
    return other.fingerprint == base.fingerprint
