"""The recipe: one frozen, validated description of a merge.

The same schema is behind the Python arguments, the command line's flags, the YAML file, the card and the replay.
Nothing heavier than pydantic is imported here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from mats_hub.errors import RecipeError, unknown
from mats_hub.hub_id import from_address, short_name
from mats_hub.initialization_options import (
    INITIALIZATION_OPTIONS,
    Average,
    Finite,
    Initialization,
    NonNegative,
    Part,
)
from mats_hub.mergekit_config import from_mergekit, is_mergekit
from mats_hub.methods import AUTO, DEFAULTS, IMPLIED_BY_CURVATURE, METHODS
from mats_hub.schema_errors import explain

RECIPE_FILE = "mats_recipe.yaml"
NAME_PATTERN = r"^\w[\w.-]*$"
"""What a task may be called: it becomes a folder's name."""

CurvatureKind = Literal["gram", "kfac", "fisher", "block_fisher", "task_vector"]
ParameterKind = Literal["linear", "convolution", "experts", "embedding", "norm", "bias"]
PARAMETERS: tuple[ParameterKind, ...] = get_args(ParameterKind)
"""What is done with a parameter: it multiplies rows, patches or the rows routed to each of several experts; it is looked up;
it scales features; it is added."""


Place = Annotated[
    str, BeforeValidator(lambda value: from_address(str(value)) if isinstance(value, str | Path) else value)
]
"""A Hub id, given as such or as the address of its page, or a path on this machine."""


class Curvature(Part):
    """Which directions of each weight matter to each task, and how the tasks are brought to one scale."""

    kind: CurvatureKind = Field(
        "kfac",
        description="gram (inputs), kfac (inputs and output gradients), fisher (diagonal), block_fisher (of a vector) or "
        "task_vector (Gram of the task vector's own rows: needs no statistics)",
    )
    off_diagonal: float = Field(1.0, ge=0, le=1, description="factor of the Grams' off-diagonal entries (RegMean: 0.9)")
    floor: NonNegative = Field(0.0, description="smallest value of a Fisher entry")
    parameters: tuple[ParameterKind, ...] = Field(
        PARAMETERS, description="with gram and kfac, the kinds of parameters that are matched; the rest is initialized"
    )
    normalization: Literal["none", "trace", "frobenius"] = Field(
        "none", description="brings each expert's curvature at each weight to mean diagonal or Frobenius norm one"
    )


class Solver(Part):
    """How the linear system is solved from the initialization."""

    method: Literal["cg", "exact"] = Field(
        "cg", description="conjugate gradient, or the closed form where there is one"
    )
    iterations: int = Field(
        100, ge=0, le=100_000, description="conjugate-gradient steps; stopping there is part of the method"
    )
    tolerance: float = Field(0.0, ge=0, lt=1, description="stop earlier once the relative residual is below this")
    preconditioner: Literal["none", "kronecker"] = Field(
        "none", description="none is the paper's path; kronecker (K-FAC only) needs far fewer iterations"
    )
    damping: NonNegative = Field(
        0.0,
        description="the initialization counts as one more expert whose curvature, in every direction, is this times the mean "
        "diagonal of the others' sum (0.1 to 1 for K-FAC solved far); 0 is the paper's",
    )
    subspace: Literal["whole", "factors"] = Field(
        "whole",
        description="factors: K-FAC of LoRA adapters solved within the span of their B factors, so that nothing is cut",
    )


class ExpertEntry(Part):
    """One expert of a recipe."""

    model: Place = Field(description="Hub id 'owner/name[/folder][@revision]' or a folder")
    name: str | None = Field(
        None, pattern=NAME_PATTERN, description="what its task is called; the id's last part otherwise"
    )
    weight: Finite = Field(1.0, description="how much it counts; below 0 takes its task vector away")
    statistics: Place | None = Field(
        None, description="file with its statistics; looked for beside the expert otherwise"
    )
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="fingerprint of its weights, checked when given"
    )

    @property
    def task(self) -> str:
        """What its task is called, as far as that is known before it is opened."""
        return self.name or short_name(self.model)

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if not weight:
            raise ValueError("an expert of weight 0 counts for nothing; leave it out")
        return weight


class Output(Part):
    """How the merged model is written."""

    format: Literal["auto", "full", "adapter"] = Field(
        "auto",
        description="full checkpoint, or adapter; auto: an adapter when all experts are of one type, LoRA or (IA)³",
    )
    rank: int | None = Field(
        None, ge=1, description="rank of a written LoRA adapter; the sum of the experts' ranks otherwise"
    )
    dtype: Literal["stored", "float32", "float16", "bfloat16"] = Field("stored", description="dtype of merged weights")
    max_shard_size: str = Field("5GB", pattern=r"^\d+(\.\d+)?(KB|MB|GB|TB)$", description="largest shard")


class Recipe(Part):
    """A merge, completely described; every field has its final value.

    Build one with `Recipe.build` (arguments), `Recipe.from_mapping` or `Recipe.load` (YAML): they fill in what the named
    method implies.
    """

    method: str = Field(
        "auto",
        description="the named method; auto takes what fits the statistics, experts and base there are, and says what and why",
    )
    base: Place | None = Field(None, description="the pretrained model; an adapter's own base when not given")
    experts: tuple[ExpertEntry, ...] = Field(min_length=1)
    initialization: Initialization = Field(default_factory=Average)
    curvature: Curvature | None = None
    solver: Solver | None = None
    unmatched: Literal["error", "initialize"] = Field(
        "error", description="what to do with a module that some experts have no statistics for"
    )
    include: tuple[str, ...] = Field((), description="patterns of tensors to merge; all when empty")
    exclude: tuple[str, ...] = Field((), description="patterns of tensors to take from the base unchanged")
    keep_per_task: tuple[str, ...] = Field(
        (), description="patterns of tensors to keep per expert beside the merged ones"
    )
    allow_other_base: bool = Field(False, description="accept adapters that name another base (a mirror of this one)")
    vocabulary: Literal["error", "base", "common"] = Field(
        "error",
        description="where experts have other rows in their vocabulary: error, base (the base's embeddings are kept), or common "
        "(the rows that all have are merged, the rest is the base's)",
    )
    tokenizer: Place | None = Field(
        None,
        description="model the tokenizer and processor files come from; otherwise the base, or the experts, where they agree on "
        "another chat template or end of text",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random draw")
    output: Output = Field(default=Output.model_validate({}))

    @field_validator("experts")
    @classmethod
    def _names_differ(cls, experts: tuple[ExpertEntry, ...]) -> tuple[ExpertEntry, ...]:
        given = [expert.name for expert in experts if expert.name]
        repeated = {name for name in given if given.count(name) > 1}
        if repeated:
            raise ValueError(f"two experts are named {sorted(repeated)[0]!r}; give each its own name")
        return experts

    @model_validator(mode="after")
    def _curvature_has_solver(self) -> Recipe:
        if (self.curvature is None) != (self.solver is None):
            raise ValueError("a curvature needs a solver and a solver needs a curvature; give both or neither")
        kfac = self.curvature is not None and self.curvature.kind == "kfac"
        if self.solver is not None and self.solver.preconditioner == "kronecker" and not kfac:
            raise ValueError(
                "preconditioner 'kronecker' belongs to curvature kind 'kfac'; use 'none', or solver method 'exact'"
            )
        if self.solver is not None and self.solver.subspace == "factors" and not kfac:
            raise ValueError(
                "subspace 'factors' belongs to curvature kind 'kfac': with the others nothing lies outside; leave it out"
            )
        if self.output.rank is not None and self.output.format == "full":
            raise ValueError("output rank belongs to output format 'adapter'; a full checkpoint has none")
        return self

    @classmethod
    def build(cls, experts: Sequence[str | Mapping[str, Any]], **options: Any) -> Recipe:
        """Return a recipe from experts and flat options, as the command line gives them.

        Args:
            experts: Hub ids, folders, or mappings with the fields of `ExpertEntry`.
            **options: fields of the recipe, or of its parts by their own name (``scale=0.3`` for the initialization's,
                ``iterations=50`` for the solver's); ``initialization``, ``curvature`` and ``solver`` take a name.

        Raises:
            RecipeError: an option is unknown or has a value it cannot have.

        """
        entries = [{"model": str(e)} if isinstance(e, str | Path) else dict(e) for e in experts]
        content: dict[str, Any] = {"experts": entries}
        for part, key in PARTS_OF_METHOD.items():
            value = options.pop(part, None)
            if value is not None:
                content[part] = {key: value} if isinstance(value, str) else _plain(value)
        for name, value in options.items():
            if value is None:
                continue
            owner = OPTION_OWNERS.get(name)
            if owner is None and name not in cls.model_fields:
                raise RecipeError(unknown("option", name, [*cls.model_fields, *OPTION_OWNERS]))
            if owner is None:
                content[name] = value
            else:
                content.setdefault(owner, {})[name] = value
        return cls.from_mapping(content)

    def changed(self, **options: Any) -> Recipe:
        """Return the recipe with other options, named as for `build`; what another method implies is filled in anew.

        ``weight.NAME`` is the weight of the expert of that name.

        Raises:
            RecipeError: an option is unknown or has a value it cannot have.

        """
        content = self._content(exclude_none=True)
        if "method" in options and options["method"] != self.method:
            content = {name: value for name, value in content.items() if name not in PARTS_OF_METHOD}
        for part, key in PARTS_OF_METHOD.items():
            if isinstance(options.get(part), str) and options[part] != content.get(part, {}).get(key):
                content.pop(part, None)
        experts = content.pop("experts")
        named = dict(zip((entry.task for entry in self.experts), experts, strict=True))
        for name in [name for name in options if name.startswith(WEIGHT_OF)]:
            expert = name.removeprefix(WEIGHT_OF)
            if expert not in named:
                raise RecipeError(f"{name}: {unknown('expert', expert, named)}")
            named[expert]["weight"] = options.pop(name)
        flat = {name: value for name, value in content.items() if name not in (*PARTS_OF_METHOD, "output")}
        for part in (*PARTS_OF_METHOD, "output"):
            values = dict(content.get(part, {}))
            if part in PARTS_OF_METHOD and PARTS_OF_METHOD[part] in values:
                flat[part] = values.pop(PARTS_OF_METHOD[part])
            flat |= values
        return Recipe.build(experts, **flat | options)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe from a YAML file.

        Raises:
            RecipeError: the file is not there, is not YAML, or is no valid recipe.

        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read the recipe {str(path)!r}: {error}") from None
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, label: str = "recipe") -> Recipe:
        """Return the recipe in a YAML text (read by ``safe_load``).

        Raises:
            RecipeError: it is not YAML or no valid recipe.

        """
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise RecipeError(f"{label} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise RecipeError(f"{label} holds no mapping; it needs at least 'experts:', a list of models")
        return cls.from_mapping(content)

    @classmethod
    def from_mapping(cls, content: Mapping[str, Any]) -> Recipe:
        """Return a recipe from a mapping, with what the named method implies filled in; or from a configuration of mergekit.

        Raises:
            RecipeError: a key is unknown, a value cannot be, or an option belongs to another method.

        """
        filled = _fill_in(from_mergekit(content) if is_mergekit(content) else dict(content))
        try:
            return cls.model_validate(filled)
        except ValidationError as error:
            raise RecipeError(explain(error, _part_at, INITIALIZATION_OPTIONS)) from None

    def to_yaml(self) -> str:
        """Return the recipe as YAML, every value written out."""
        return yaml.safe_dump(self._content(), sort_keys=False, allow_unicode=True, width=120)

    def _content(self, **how: Any) -> dict[str, Any]:
        """Return what makes the same recipe: without the parts that method ``auto`` will choose."""
        return self.model_dump(mode="json", exclude=set(PARTS_OF_METHOD) if self.method == AUTO else None, **how)

    def resolve(self, facts: Collection[str]) -> tuple[Recipe, str]:
        """Return the recipe with method ``auto`` replaced by what fits, and why in words.

        Args:
            facts: the kinds of statistics that every expert has, and what the experts are (see `mats_hub.methods.DEFAULTS`).

        """
        row = next(row for row in DEFAULTS if row.fact in facts)
        content = self.model_dump(exclude={"initialization", "curvature", "solver"})
        return self.from_mapping({**content, **row.settings}), row.because


WEIGHT_OF = "weight."
"""What the option begins with that is an expert's weight."""

PARTS_OF_METHOD = {"initialization": "method", "curvature": "kind", "solver": "method"}
"""Part of a recipe that a method implies → the field that names its kind."""

OPTION_OWNERS: dict[str, str] = {
    **{
        name: "initialization"
        for options in INITIALIZATION_OPTIONS.values()
        for name in options.model_fields
        if name != "method"
    },
    **{name: "curvature" for name in Curvature.model_fields if name != "kind"},
    **{name: "solver" for name in Solver.model_fields if name != "method"},
    **{name: "output" for name in Output.model_fields},
}
"""Flat option → the part of the recipe it belongs to."""


def _fill_in(content: dict[str, Any]) -> dict[str, Any]:
    """Put in what the method's row says for the parts and options that were not given."""
    if isinstance(content.get("experts"), list):
        content["experts"] = [{"model": e} if isinstance(e, str) else e for e in content["experts"]]
    given_parts = [part for part in PARTS_OF_METHOD if content.get(part) is not None]
    name = content.setdefault("method", "mats" if given_parts else AUTO)
    if name == AUTO:
        if given_parts:
            raise RecipeError(
                f"method 'auto' chooses the {given_parts[0]} itself, by what there is; leave it and its options out, or name a "
                "method, such as 'mats', which takes any"
            )
        return content
    if not isinstance(name, str) or name not in METHODS:
        raise RecipeError(unknown("method", name, [AUTO, *METHODS]))
    row, curvature = METHODS[name], content.get("curvature")
    kind = curvature.get("kind") if isinstance(curvature, Mapping) else curvature
    for part, key in PARTS_OF_METHOD.items():
        implied, given = getattr(row, part), content.get(part)
        given = {key: given} if isinstance(given, str) else given
        if implied is None:
            if given is not None:
                raise RecipeError(f"method {name!r} has no {part} to choose; leave it out, or use method 'mats'")
            content[part] = None
            continue
        if given is not None and not isinstance(given, Mapping):
            raise RecipeError(f"{part} must be a name or a mapping of options, not {given!r}")
        given = dict(given or {})
        if name != "mats" and given.get(key, implied[key]) != implied[key]:
            way_out = (
                "use method 'mats', which takes any" if name in ("fisher", "regmean") else "name that method instead"
            )
            raise RecipeError(f"method {name!r} has {part} {implied[key]!r}, not {given[key]!r}; {way_out}")
        same = given.get(key, implied[key]) == implied[key]
        extra = IMPLIED_BY_CURVATURE.get(kind, {}).get(part, {}) if isinstance(kind, str) and name == "mats" else {}
        content[part] = {**(implied if same else {}), **(extra if same or part == "curvature" else {}), **given}
    return content


PARTS: dict[str, type[Part]] = {
    **{"experts": ExpertEntry, "curvature": Curvature, "solver": Solver, "output": Output},
    **INITIALIZATION_OPTIONS,
}
"""Step to a place in a recipe → the schema's class from there on."""


def _part_at(place: Sequence[str]) -> type[Part]:
    return next((PARTS[step] for step in reversed(place) if step in PARTS), Recipe)


def _plain(value: Any) -> dict[str, Any]:
    return value.model_dump() if isinstance(value, Part) else dict(value)


CURVATURE_KINDS: tuple[str, ...] = get_args(CurvatureKind)
STATISTICS_KINDS = tuple(kind for kind in CURVATURE_KINDS if kind != "task_vector")
"""The kinds of curvature that are made from statistics."""
