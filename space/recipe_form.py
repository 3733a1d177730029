"""The form of a recipe: its options as the schema has them, and what is written of it."""

from __future__ import annotations

import typing
from typing import Any

import gradio as gr
from presets import PRESETS, TITLES

from mats_hub import MatsError, Recipe
from mats_hub.recipe import INITIALIZATION_OPTIONS, PARTS, Curvature, ExpertEntry, Solver


def schema_fields() -> dict[str, dict[str, Any]]:
    """Return part → option → its field, from the recipe's schema: the only list of options there is."""
    starts: dict[str, Any] = {}
    for options in INITIALIZATION_OPTIONS.values():
        starts |= {name: field for name, field in options.model_fields.items() if name != "method"}
    return {
        "experts": {"weight": ExpertEntry.model_fields["weight"]},
        "initialization": starts,
        "curvature": {name: field for name, field in Curvature.model_fields.items() if name != "kind"},
        "solver": {name: field for name, field in Solver.model_fields.items() if name != "method"},
        "output": dict(PARTS["output"].model_fields),
    }


def component(name: str, field: Any) -> Any:
    """Return the component for an option; empty means what the method implies."""
    label, info = name.replace("_", " "), field.description
    choices = [str(value) for value in typing.get_args(field.annotation) if isinstance(value, str)]
    if choices:
        return gr.Dropdown(["", *choices], value="", label=label, info=info)
    info += "; one number for each, in their order" if name == "weight" else ""
    return gr.Textbox("", label=label, info=info, max_length=60)


def recipe_of(experts: list[str], base: str, preset: str, names: list[str], values: list[Any]) -> str:
    """Return the recipe of the form as YAML."""
    if not experts:
        raise gr.Error("Add experts first.")
    options: dict[str, Any] = {"weight": "1 " * len(experts), **PRESETS[TITLES.index(preset)].options}
    for name, value in zip(names, values, strict=True):
        if value not in ("", None):
            options[name] = tuple(str(value).split()) if name == "parameters" else value
    weights = options.pop("weight").split()
    if len(weights) != len(experts):
        raise gr.Error(
            f"There are {len(weights)} weights for {len(experts)} experts; give one for each, in their order."
        )
    entries = [{"model": model, "weight": weight} for model, weight in zip(experts, weights, strict=True)]
    try:
        return Recipe.build(entries, base=base.strip() or None, **options).to_yaml()
    except MatsError as error:
        raise gr.Error(str(error)) from None


def kept_or_written(text: str, experts: list[str], base: str, preset: str, names: list[str], values: list[Any]) -> Any:
    """Leave alone the recipe that is there while it is of these experts and base, so that nobody's edits are lost."""
    try:
        recipe = Recipe.from_yaml(text or "")
        if [entry.model for entry in recipe.experts] == experts and (recipe.base or "") == base.strip():
            return gr.skip()
    except MatsError:
        pass
    return recipe_of(experts, base, preset, names, values)


def there_or_written(text: str, *form: Any) -> Any:
    """Leave alone the recipe that is there, whatever it is; write one where there is none."""
    return gr.skip() if (text or "").strip() else recipe_of(*form)


def explained(preset: str) -> str:
    """Return what a preset does and solves."""
    chosen = PRESETS[TITLES.index(preset)]
    return f"{chosen.text}\n\n$$ {chosen.formula} $$"
