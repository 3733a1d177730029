"""The ways to merge that the page offers, in plain words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mats_hub.methods import METHODS


@dataclass(frozen=True)
class Preset:
    """A way to merge, in plain words.

    Attributes:
        title: what it is called.
        text: what it does, in one sentence.
        formula: what it solves.
        options: its options, as of `Recipe.build`.

    """

    title: str
    text: str
    formula: str
    options: dict[str, Any]


PRESETS = [
    Preset(
        "MaTS, with statistics",
        "Matches the experts in the directions that matter to each one's task. The best choice when every expert has statistics.",
        r"(\sum_i w_i C_i)\,\theta = \sum_i w_i C_i\,\theta_i,\quad C_i = E[g g^\top] \otimes E[x x^\top]",
        {
            "method": "mats",
            "curvature": "kfac",
            "normalization": "trace",
            "preconditioner": "kronecker",
            "iterations": 30,
            "damping": 0.3,
            "tolerance": 0.01,
        },
    ),
    Preset(
        "MaTS, without data",
        "The same, with directions told from the experts' own changes. Needs nothing but the experts and their base.",
        r"C_i = \tau_i^\top \tau_i / \operatorname{mean}\operatorname{diag}",
        {
            "method": "mats",
            "curvature": "task_vector",
            "initialization": "task_arithmetic",
            "scale": 0.4,
            "tolerance": 0.01,
        },
    ),
    Preset(
        "RegMean",
        "Makes every linear layer's outputs match the experts' on average, in closed form. Needs statistics of the inputs.",
        METHODS["regmean"].equation,
        {"method": "regmean"},
    ),
    Preset(
        "TIES",
        "Keeps each expert's largest changes and, where they disagree in sign, the side with more weight. Needs no data.",
        METHODS["ties"].equation,
        {"method": "ties"},
    ),
    Preset(
        "Average",
        "The mean of all weights. A point to compare with.",
        METHODS["average"].equation,
        {"method": "average"},
    ),
]
TITLES = [preset.title for preset in PRESETS]
