"""The options of every initialization, as parts of a recipe's schema. Nothing heavier than pydantic is imported here."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1)]
Fuse = Literal["mean", "sum"]

SCALE = "factor of the merged task vector"
DENSITY = "fraction of entries kept, in (0, 1]"
FUSE = "what is made of the entries that agree with the elected sign"


class Part(BaseModel):
    """Any part of a recipe: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Start(Part):
    """Any initialization's options.

    Attributes:
        signed: whether it adds up task vectors, so that one of a negative weight is taken away.

    """

    signed: ClassVar[bool] = False

    @property
    def global_density(self) -> float | None:
        """The density to which whole task vectors are trimmed, where that takes a reading of all of them beforehand."""
        return None


class Average(Start):
    """The weighted mean of the experts."""

    method: Literal["average"] = "average"


class TaskArithmetic(Start):
    """The base plus a scaled sum of task vectors."""

    signed = True
    method: Literal["task_arithmetic"] = "task_arithmetic"
    scale: Finite = Field(0.3, description="factor of the sum of task vectors")


class Ties(Start):
    """Trim, elect sign, disjoint mean."""

    signed = True
    method: Literal["ties"] = "ties"
    scale: Finite = Field(1.0, description=SCALE)
    density: Density = Field(0.2, description=DENSITY)
    trim: Literal["global", "per_tensor"] = Field("global", description="what the density is a fraction of")
    fuse: Fuse = Field("mean", description=FUSE)

    @property
    def global_density(self) -> float | None:
        """The density, when it is a fraction of the whole task vector."""
        return self.density if self.trim == "global" else None


class Dare(Start):
    """Drop entries at random, rescale the rest, sum."""

    signed = True
    method: Literal["dare"] = "dare"
    scale: Finite = Field(0.3, description="factor of the sum of task vectors")
    density: Density = Field(0.5, description=DENSITY)


class DareTies(Start):
    """Drop entries at random, rescale the rest, elect sign, fuse."""

    signed = True
    method: Literal["dare_ties"] = "dare_ties"
    scale: Finite = Field(0.5, description=SCALE)
    density: Density = Field(0.5, description=DENSITY)
    fuse: Fuse = Field("sum", description=FUSE)


class Della(Start):
    """Drop small entries with a higher probability than large ones, rescale, elect sign, fuse."""

    signed = True
    method: Literal["della"] = "della"
    scale: Finite = Field(0.5, description=SCALE)
    density: Density = Field(0.5, description=DENSITY)
    epsilon: float = Field(0.1, ge=0, lt=0.5, description="how far the probability to be kept varies about the density")
    fuse: Fuse = Field("sum", description=FUSE)


class Breadcrumbs(Start):
    """Leave out the largest and the smallest entries of each tensor, sum."""

    signed = True
    method: Literal["breadcrumbs"] = "breadcrumbs"
    scale: Finite = Field(0.3, description="factor of the sum of task vectors")
    density: Density = Field(0.9, description=DENSITY)
    outliers: float = Field(0.01, ge=0, lt=1, description="fraction of largest entries left out")


class Slerp(Start):
    """Spherical interpolation between the weights of two experts."""

    method: Literal["slerp"] = "slerp"


class ModelStock(Start):
    """The mean of the experts, drawn towards the base by the angle between their task vectors."""

    method: Literal["model_stock"] = "model_stock"


class Tsvm(Start):
    """The largest singular directions of each task vector, made orthogonal to each other."""

    method: Literal["tsvm"] = "tsvm"
    scale: Finite = Field(1.0, description=SCALE)


class IsoC(Start):
    """The sum of task vectors with all singular values made equal."""

    method: Literal["iso_c"] = "iso_c"
    scale: Finite = Field(1.0, description=SCALE)


class IsoCts(Start):
    """Common directions of the sum and task-specific ones, with all singular values made equal."""

    method: Literal["iso_cts"] = "iso_cts"
    scale: Finite = Field(1.0, description=SCALE)
    common: Density = Field(0.8, description="fraction of directions taken from the sum of task vectors")


class Knots(Start):
    """TIES in the basis that the task vectors share."""

    method: Literal["knots"] = "knots"
    scale: Finite = Field(1.0, description=SCALE)
    density: Density = Field(0.2, description=DENSITY)
    fuse: Fuse = Field("mean", description=FUSE)


class Consensus(Start):
    """A merged task vector without the entries that few tasks use."""

    method: Literal["consensus"] = "consensus"
    vector: Literal["task_arithmetic", "ties"] = Field("task_arithmetic", description="the merged task vector")
    scale: Finite = Field(0.3, description=SCALE)
    density: Density = Field(0.2, description=f"with ties: {DENSITY}")
    agreement: int = Field(2, ge=0, description="how many tasks have to use an entry for it to be kept")
    mask_scale: tuple[Positive, ...] = Field(
        (0.4,), min_length=1, description="one value, or one per expert: a smaller one makes a task use more entries"
    )

    @property
    def global_density(self) -> float | None:
        """The density, when the merged task vector is of TIES."""
        return self.density if self.vector == "ties" else None


Initialization = Annotated[
    Average
    | TaskArithmetic
    | Ties
    | Dare
    | DareTies
    | Della
    | Breadcrumbs
    | Slerp
    | ModelStock
    | Tsvm
    | IsoC
    | IsoCts
    | Knots
    | Consensus,
    Field(discriminator="method"),
]
INITIALIZATION_OPTIONS: dict[str, type[Start]] = {
    str(options.model_fields["method"].default): options
    for options in (
        *(
            Average,
            TaskArithmetic,
            Ties,
            Dare,
            DareTies,
            Della,
            Breadcrumbs,
            Slerp,
            ModelStock,
            Tsvm,
            IsoC,
            IsoCts,
            Knots,
        ),
        Consensus,
    )
}
