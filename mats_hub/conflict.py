"""Where experts agree and where they pull apart: cosines and sign conflicts between their task vectors, tensor by tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.device import choose_device
from mats_hub.figures import draw_heat_maps
from mats_hub.merged_model import as_recipe
from mats_hub.planning import make_plan
from mats_hub.progress import Progress, silent
from mats_hub.reading import Span, over_spans
from mats_hub.recipe import Recipe


@dataclass(frozen=True)
class Agreement:
    """How the task vectors of several experts lie to each other, at one tensor or at several.

    Attributes:
        name: the tensor, or what several have in common.
        experts: the experts' names.
        products: ⟨τᵢ, τⱼ⟩ of each pair ``[experts, experts]``; on the diagonal the squared norms.
        opposed: entries that both of a pair change, to different sides ``[experts, experts]``.
        shared: entries that both of a pair change ``[experts, experts]``.

    """

    name: str
    experts: tuple[str, ...]
    products: Tensor
    opposed: Tensor
    shared: Tensor

    @property
    def cosines(self) -> Tensor:
        """⟨τᵢ, τⱼ⟩ / (‖τᵢ‖ ‖τⱼ‖) of each pair; NaN where one is zero."""
        norms = self.products.diagonal().sqrt()
        return self.products / torch.outer(norms, norms)

    @property
    def conflicts(self) -> Tensor:
        """The share of the entries that both of a pair change which they change to different sides; NaN where there are none."""
        return self.opposed / self.shared


def agreement(
    experts: Recipe | Sequence[str | Mapping[str, Any]] | str | Path,
    *,
    device: str = "auto",
    token: str | bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[Agreement]:
    """Compare the experts' task vectors at every tensor that would be merged, reading each once.

    Args:
        experts: a recipe or experts, as for `mats_hub.merge`; the method counts for nothing.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        token: Hub token; the one stored on this machine otherwise.
        progress: wraps the iteration over tensors.
        **options: recipe options when `experts` is a list: ``base``, …

    Raises:
        PlanError: what stands in the way of merging them; task vectors need a base.
        NumericalError: a non-finite value in a model.

    """
    plan = make_plan(as_recipe(experts, **options).changed(method="task_arithmetic"), token)
    plan.raise_problems()
    place, names = choose_device(device), tuple(expert.name for expert in plan.experts)

    def compared(span: Span) -> Tensor:
        stacked = torch.stack(span.read(plan, place)[1])
        signs = stacked.sign()
        touched = signs.abs()
        same, shared = (signs @ signs.T).cpu().double(), (touched @ touched.T).cpu().double()
        return torch.stack([(stacked @ stacked.T).cpu().double(), (shared - same) / 2, shared])

    reading = over_spans(plan, plan.merged_entries, place, compared)
    found = [
        Agreement(entry.key, names, *sums)
        for entry, sums in (progress or silent)(reading, len(plan.merged_entries), "comparing task vectors")
    ]
    plan.finish_reading()
    return found


def by_layer(found: Sequence[Agreement]) -> list[Agreement]:
    """Sum up what is in the same layer: the first number in a tensor's name, or without one what stands before its end."""
    layers: dict[str, list[Agreement]] = {}
    for one in found:
        number = re.search(r"^(?:.*?\.)??(\d+)\.", one.name)
        name = f"layer {number[1]}" if number else one.name.rpartition(".")[0].rpartition(".")[2] or one.name
        layers.setdefault(name, []).append(one)
    parts = ("products", "opposed", "shared")
    return [
        Agreement(name, held[0].experts, *(reduce(add, [getattr(one, part) for one in held]) for part in parts))
        for name, held in layers.items()
    ]


def table(layers: Sequence[Agreement]) -> str:
    """Return a line for each layer: the cosine and the sign conflict of each pair of experts."""
    pairs = _pairs(layers)
    titles = [f"{a} · {b}" for a, b, _ in pairs]
    left = max([len(layer.name) for layer in layers], default=0)
    lines = ["  ".join([" " * left, *titles]), *([] if titles else ["one expert alone agrees with itself"])]
    for layer in layers if titles else ():
        cells = (f"{float(layer.cosines[at]):+.2f} {float(layer.conflicts[at]):4.0%}" for _, _, at in pairs)
        lines.append(
            "  ".join(
                [layer.name.ljust(left), *(cell.ljust(len(title)) for cell, title in zip(cells, titles, strict=True))]
            ).rstrip()
        )
    return "\n".join(
        [
            *lines,
            "",
            "cosine of the task vectors, and share of the entries both change that they change to different sides",
        ]
    )


def draw(layers: Sequence[Agreement], path: Path) -> None:
    """Draw cosines and sign conflicts as two heat maps, layers by pairs of experts, into a PNG file; not of one expert alone."""
    pairs = _pairs(layers)
    if not pairs:
        return

    def values(part: str) -> list[list[float]]:
        return [[float(getattr(layer, part)[at]) for _, _, at in pairs] for layer in layers]

    maps = {"cosine": (values("cosines"), -1.0, 1.0, "RdBu"), "sign conflict": (values("conflicts"), 0.0, 1.0, "Reds")}
    draw_heat_maps(maps, [layer.name for layer in layers], [f"{a} · {b}" for a, b, _ in pairs], path)


def _pairs(layers: Sequence[Agreement]) -> list[tuple[str, str, tuple[int, int]]]:
    """Return each pair of experts: their names, and where in the matrices they are."""
    names = layers[0].experts if layers else ()
    return [(names[i], names[j], (i, j)) for i, j in combinations(range(len(names)), 2)]
