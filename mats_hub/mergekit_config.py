"""Configurations of mergekit, which many merges on the Hub were made from, read as recipes.

What a method and its parameters mean there is in https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mats_hub.errors import RecipeError, unknown
from mats_hub.schema_errors import explain

WHOLE = "name whole models under 'models'"
WAYS_OUT = {"slices": WHOLE, "modules": WHOLE, "chat_template": "leave it out, and say with 'tokenizer' whose is taken"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class _Parameters(_Part):
    """Of one model; each a number for all layers and tensors."""

    weight: float | None = None
    density: float | None = None
    gamma: float | None = None
    epsilon: float | None = None


class _Shared(_Parameters):
    """Of all models."""

    factor: float = Field(1.0, alias="lambda")
    normalize: bool | None = None
    rescale: bool | None = None
    int8_mask: bool = False  # how signs are held in memory
    filter_wise: Literal[False] = False
    t: float | None = None


class _Model(_Part):
    model: str = Field(pattern=r"^[^+]+$")
    parameters: _Parameters = _Parameters.model_validate({})


class _Source(_Part):
    source: str


class _Config(_Part):
    merge_method: str
    models: tuple[_Model, ...] = Field(min_length=1)
    base_model: str | None = None
    parameters: _Shared = _Shared.model_validate({})
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    tokenizer: _Source | None = None


@dataclass(frozen=True)
class _Row:
    """One of its methods.

    Attributes:
        method: ours.
        options: its parameter → our option.
        fuses: whether ``normalize`` chooses between the mean and the sum of the entries that agree.
        normalizes: whether it does so unless told otherwise.
        rescales: whether kept entries are rescaled.
        fixed: options of ours that make the two the same.

    """

    method: str
    options: Mapping[str, str] = field(default_factory=dict)
    fuses: bool = False
    normalizes: bool = False
    rescales: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)


_SCALED, _TRIMMED = {"factor": "scale"}, {"factor": "scale", "density": "density"}
ROWS = {
    "linear": _Row("average", normalizes=True),
    "slerp": _Row("slerp"),
    "model_stock": _Row("model_stock"),
    "task_arithmetic": _Row("task_arithmetic", _SCALED),
    "ties": _Row("ties", _TRIMMED, fuses=True, normalizes=True, fixed={"trim": "per_tensor"}),
    "dare_linear": _Row("dare", _TRIMMED, rescales=True),
    "dare_ties": _Row("dare_ties", _TRIMMED, fuses=True, rescales=True),
    "della": _Row("della", {**_TRIMMED, "epsilon": "epsilon"}, fuses=True, normalizes=True, rescales=True),
    "breadcrumbs": _Row("breadcrumbs", {**_TRIMMED, "gamma": "outliers"}),
}
"""Its method → ours. A method that both have is a row here."""

IMPLIED = {"weight": 1.0, "density": 1.0, "gamma": 0.01, "epsilon": 0.15}
"""Parameter → what it is where it is not given."""


def is_mergekit(content: Mapping[str, Any]) -> bool:
    """Tell whether this is a configuration of mergekit."""
    return "merge_method" in content


def from_mergekit(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the recipe that merges the same models in the same way.

    DARE and DELLA divide what they keep by its probability, as their papers do, and not by the ratio of the norms.

    Raises:
        RecipeError: something in it has no equal here: another method, slices, or a parameter that differs by layer or model.

    """
    for key in sorted(WAYS_OUT.keys() & content.keys()):
        raise RecipeError(f"this mergekit configuration has {key!r}, which cannot be taken over; {WAYS_OUT[key]}")
    try:
        config = _Config.model_validate(content)
    except ValidationError as error:
        told = explain(error, _part_at)
        raise RecipeError(f"a mergekit configuration that cannot be taken over: {told}") from None
    if config.merge_method not in ROWS:
        raise RecipeError(f"merge_method: {unknown('value', config.merge_method, ROWS)}")
    row, shared, base = ROWS[config.merge_method], config.parameters, config.base_model
    normalize = row.normalizes if shared.normalize is None else shared.normalize
    if shared.rescale not in (None, row.rescales):
        raise RecipeError(f"{row.method} {'always' if row.rescales else 'never'} rescales; leave 'rescale' out")
    models = [m for m in config.models if config.merge_method in ("linear", "slerp") or m.model != base]
    weights: list[float] = [_value("weight", model, shared) for model in models]
    if config.merge_method == "slerp":
        if shared.t is None:
            raise RecipeError("a mergekit configuration of slerp has to say how far to go: parameters.t is missing")
        models, weights = _from_the_base(models, base), [1 - shared.t, shared.t]
        if len(models) != 2:
            raise RecipeError(f"slerp goes from base_model to one other model, and there are {len(models)} with it")
    total = math.fsum(weights)
    options = {ours: _of_all(theirs, models, shared) for theirs, ours in row.options.items()}
    if config.merge_method == "linear" and not normalize and abs(total - 1) > 1e-6:
        raise RecipeError(f"weights of a linear merge that is not normalized have to sum to 1, and these to {total:g}")
    if options.get("density") == 1 and "epsilon" in options:
        options["epsilon"] = 0.0  # nothing is dropped
    if row.fuses:
        options["fuse"] = "mean" if normalize else "sum"
    elif normalize and "scale" in options and total:
        options["scale"] /= total
    recipe = {
        "method": row.method,
        "base": base,
        "experts": [{"model": m.model, "weight": weight} for m, weight in zip(models, weights, strict=True)],
        "initialization": {**options, **row.fixed},
        "tokenizer": _tokenizer(config),
    }
    dtype = config.out_dtype or config.dtype
    return recipe | ({"output": {"dtype": dtype}} if dtype else {})


def _part_at(place: Sequence[str]) -> type[BaseModel]:
    if "parameters" in place:
        return _Parameters if "models" in place else _Shared
    return _Model if "models" in place else _Config


def _value(parameter: str, model: _Model, shared: _Shared) -> float:
    found = (getattr(model.parameters, parameter, None), getattr(shared, parameter), IMPLIED.get(parameter))
    return next(float(value) for value in found if value is not None)


def _of_all(parameter: str, models: Sequence[_Model], shared: _Shared) -> Any:
    found = {_value(parameter, model, shared) for model in models}
    if len(found) != 1:
        raise RecipeError(f"mergekit's parameter {parameter!r} differs by model ({sorted(found)}); here all have one")
    return found.pop()


def _from_the_base(models: Sequence[_Model], base: str | None) -> list[_Model]:
    """Return the two ends of a spherical interpolation, which goes from the base."""
    first = [model for model in models if model.model == base] or ([_Model(model=base)] if base else [])
    return [*first, *(model for model in models if model.model != base)]


def _tokenizer(config: _Config) -> str | None:
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source == "union":
        raise RecipeError(
            "mergekit's tokenizer 'union' cannot be taken over; leave it out, and say with 'vocabulary' what is done where "
            "vocabularies differ"
        )
    return config.base_model if source == "base" else source
