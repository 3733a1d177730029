"""What merging adapters asks of the plan: what is written, what of the base is needed, and what that base looks like."""

from __future__ import annotations

from dataclasses import replace

from mats_hub.adapter import FoldedAdapter, Ia3Adapter
from mats_hub.architecture import align, describe, vector_of
from mats_hub.checkpoint import Checkpoint
from mats_hub.errors import IncompatibleExperts, MatsError, RecipeError
from mats_hub.lora import LoraAdapter
from mats_hub.plan import Entry, Plan
from mats_hub.source import Source
from mats_hub.tensor_header import TensorHeader


def settle_format(plan: Plan) -> None:
    """Choose what is written where the recipe leaves it open, and refuse an adapter that cannot be."""
    output = plan.recipe.output
    types = {type(expert.adapter) for expert in plan.experts}
    can = len(types) == 1 and types <= {LoraAdapter, Ia3Adapter}
    if output.format == "auto":
        output = output.model_copy(update={"format": "adapter" if can else "full"})
        plan.recipe = plan.recipe.model_copy(update={"output": output})
    if output.format == "adapter" and not can:
        other = next((e for e in plan.experts if not isinstance(e.adapter, LoraAdapter)), plan.experts[0])
        plan.problems.append(
            RecipeError(
                "output format 'adapter' merges LoRA adapters, or (IA)³ adapters, among themselves, but "
                f"{other.source.spec!r} is a {other.kind}; use format 'full' (--format full)"
            )
        )
        output = output.model_copy(update={"format": "full"})  # so that planning goes on to what else stands in the way
        plan.recipe = plan.recipe.model_copy(update={"output": output})
    if output.rank is not None and (output.format == "full" or types == {Ia3Adapter}):
        plan.problems.append(
            RecipeError(
                "a rank was asked for, but what is written has none: it is no LoRA adapter; leave 'rank' out (--rank)"
            )
        )
    for expert in plan.experts:
        if output.format == "full" and isinstance(expert.adapter, Ia3Adapter):
            expert.fold()
        if isinstance(expert.adapter, FoldedAdapter):
            plan.notes.append(
                f"expert {expert.name!r} is a {expert.kind}: PEFT merges it into its base first, which needs the whole base in "
                f"memory{' and in the cache, streamed or not' if plan.streamed else ''}"
            )


def outline(plan: Plan, source: Source) -> Checkpoint:
    """Return the base of a merge of adapters into an adapter, from its config alone: what the adapters can change.

    For LoRA that is the model's tensors; for (IA)³ a vector for each module that some expert scales, and the tensors that
    some expert holds whole. A base that transformers does not know shows them by its weights' headers.
    """
    facts = describe(source.json("config.json"))
    headers = {name: TensorHeader("F32", shape, "") for name, shape in facts.shapes.items()}
    whole = Checkpoint(source, headers) if headers else Checkpoint(source)
    if not any(isinstance(expert.adapter, Ia3Adapter) for expert in plan.experts):
        return whole
    vectors: dict[str, TensorHeader] = {}
    for expert in plan.experts:
        assert isinstance(expert.adapter, Ia3Adapter)
        changes = expert.adapter.vectors
        known = {**{vector_of(name): whole.headers[name] for name in whole.headers}, **whole.headers}
        for own, target in align([*changes, *expert.adapter.saved], known, facts.stored_names).items():
            scaled = TensorHeader("F32", expert.adapter.shape(own), "") if own in changes else None
            vectors.setdefault(target, scaled or known[target])
    return Checkpoint(source, vectors)


def with_origins(plan: Plan) -> list[Entry]:
    """Return the entries, those that an expert holds whole with their names in the base's weights, which are read then."""
    assert plan.base is not None
    held = {e.key for e in plan.merged_entries for x in plan.experts if x.holds(e.key) and x.names[e.key] in x.whole}
    if not held:
        return plan.entries
    facts = describe(plan.base.config)
    try:
        plan.base_weights = Checkpoint(plan.base.source)
    except MatsError as error:
        plan.problems.append(
            IncompatibleExperts(
                f"some adapters hold {min(held)!r} whole, so that its change needs the base's weights, but: {error}. Leave it "
                "out with exclude (--exclude)"
            )
        )
        return plan.entries
    stored = {facts.tied.get(key, key) for key in held}
    names = {target: name for name, target in align(plan.base_weights.headers, stored, facts.stored_names).items()}
    return [
        replace(entry, origin=names.get(facts.tied.get(entry.key, entry.key))) if entry.key in held else entry
        for entry in plan.entries
    ]
