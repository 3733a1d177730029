"""What stands between a method and the experts that are to be merged by it, told before a weight is read."""

from __future__ import annotations

from collections.abc import Iterator

from mats_hub.base import named_by_cards
from mats_hub.checkpoint import parse_size
from mats_hub.closed_form import has_closed_form
from mats_hub.curvature import Dense, Diagonal, Gram, Identity, Kronecker
from mats_hub.errors import RecipeError
from mats_hub.initialization_options import INITIALIZATION_OPTIONS, Consensus, Slerp
from mats_hub.lora import LoraAdapter
from mats_hub.plan import LINEAR_INITIALIZATIONS, Plan

_CLASSES = {
    "gram": Gram,
    "kfac": Kronecker,
    "fisher": Diagonal,
    "block_fisher": Dense,
    "task_vector": Gram,
}


def method_problems(plan: Plan) -> Iterator[RecipeError]:
    """Yield what the recipe's method, solver and output cannot do with the plan's experts and base."""
    for told in (
        _start_clash(plan),
        _base_missing(plan),
        _weight_clash(plan),
        _solver_clash(plan),
        _factors_clash(plan),
    ):
        if told:
            yield RecipeError(told)
    try:
        parse_size(plan.recipe.output.max_shard_size)
    except ValueError:
        yield RecipeError(f"output.max_shard_size is {plan.recipe.output.max_shard_size!r}; write for example '5GB'")


def _start_clash(plan: Plan) -> str | None:
    start, count = plan.recipe.initialization, len(plan.experts)
    if isinstance(start, Slerp) and count > 2:
        return f"slerp interpolates between two experts, and there are {count}; merge two of them, or use average"
    if isinstance(start, Consensus) and len(start.mask_scale) not in (1, count):
        return f"mask_scale has {len(start.mask_scale)} values for {count} experts; give one, or one for each (--mask-scale)"
    return None


def _base_missing(plan: Plan) -> str | None:
    method = plan.recipe.initialization.method
    if plan.base or method in ("average", "slerp"):
        return None
    named = named_by_cards(plan)
    return (
        f"{method} works on task vectors, which need the base the experts were fine-tuned from; name it with 'base' "
        f"(--base{f' {named}, as their cards do' if named else ''}), or use average, fisher, regmean or mats from average"
    )


def _weight_clash(plan: Plan) -> str | None:
    recipe, start = plan.recipe, plan.recipe.initialization
    below = next((expert for expert in plan.experts if expert.weight < 0), None)
    extrapolates = start.method == "average" and sum(expert.weight for expert in plan.experts) > 0
    if not below or (not recipe.curvature and (start.signed or extrapolates)):
        return None
    signed = ", ".join(name for name, options in INITIALIZATION_OPTIONS.items() if options.signed)
    return (
        f"expert {below.name!r} has weight {below.weight:g}, but method {recipe.method!r} takes no task away. Those that add "
        f"up task vectors do ({signed}), and average where the weights have a sum above 0"
    )


def _solver_clash(plan: Plan) -> str | None:
    curvature, solver = plan.recipe.curvature, plan.recipe.solver
    if not curvature or not solver or solver.method != "exact":
        return None
    if has_closed_form([_CLASSES[curvature.kind]] * len(plan.experts) + [Identity] * bool(solver.damping)):
        return None
    return (
        f"solver 'exact' has no closed form for kfac with {len(plan.experts)} experts (two at most, and without damping); use "
        "solver 'cg'"
    )


def _factors_clash(plan: Plan) -> str | None:
    recipe = plan.recipe
    if not recipe.solver or recipe.solver.subspace != "factors":
        return None
    lora = all(isinstance(expert.adapter, LoraAdapter) for expert in plan.experts)
    if recipe.output.format == "adapter" and lora and recipe.initialization.method in LINEAR_INITIALIZATIONS:
        return None
    return (
        "subspace 'factors' solves within the span of LoRA factors, for a merge of LoRA adapters into an adapter (--format "
        f"adapter) from {' or '.join(LINEAR_INITIALIZATIONS)}; leave it out (--subspace)"
    )
