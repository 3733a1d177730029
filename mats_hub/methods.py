"""The named methods, as rows of one table: what each is made of, and what to say of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One named method: which parts it is made of, and what to say of it.

    Attributes:
        title: its name in prose.
        summary: one sentence.
        equation: LaTeX, for the card.
        paper: title and authors.
        arxiv: the paper's arXiv id.
        initialization: its initialization and options.
        curvature: its curvature and options, or None when nothing is matched.
        solver: its solver and options, or None.

    """

    title: str
    summary: str
    equation: str
    paper: str
    arxiv: str
    initialization: Mapping[str, Any]
    curvature: Mapping[str, Any] | None = None
    solver: Mapping[str, Any] | None = None


METHODS: dict[str, Method] = {
    "average": Method(
        "Average",
        "The weighted mean of the experts.",
        r"\theta = \frac{\sum_i w_i \theta_i}{\sum_i w_i}",
        "Model soups (Wortsman et al., 2022)",
        "2203.05482",
        {"method": "average"},
    ),
    "task_arithmetic": Method(
        "Task Arithmetic",
        "The base plus a scaled sum of the task vectors.",
        r"\theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)",
        "Editing Models with Task Arithmetic (Ilharco et al., 2023)",
        "2212.04089",
        {"method": "task_arithmetic"},
    ),
    "ties": Method(
        "TIES",
        "Small entries of the task vectors are trimmed, a sign is elected, agreeing entries are averaged.",
        r"\theta = \theta_0 + \lambda \, \mathrm{mean}_{i:\, \mathrm{sign}(\hat\tau_i) = \gamma}\, \hat\tau_i",
        "TIES-Merging (Yadav et al., 2023)",
        "2306.01708",
        {"method": "ties"},
    ),
    "dare": Method(
        "DARE",
        "Entries of the task vectors are dropped at random and the rest rescaled, then summed.",
        r"\theta = \theta_0 + \lambda \sum_i w_i \, \frac{m_i \odot (\theta_i - \theta_0)}{p}",
        "Language Models are Super Mario (Yu et al., 2024)",
        "2311.03099",
        {"method": "dare"},
    ),
    "fisher": Method(
        "Fisher merging",
        "An average weighted, entry by entry, by the diagonal of each expert's Fisher.",
        r"\Big(\sum_i w_i F_i\Big)\,\theta = \sum_i w_i F_i\, \theta_i",
        "Merging Models with Fisher-Weighted Averaging (Matena & Raffel, 2022)",
        "2111.09832",
        {"method": "average"},
        {"kind": "fisher", "floor": 1e-8},
        {"method": "exact"},
    ),
    "regmean": Method(
        "RegMean",
        "The least-squares match of every linear module's outputs on each expert's inputs.",
        r"W \sum_i w_i G_i = \sum_i w_i W_i G_i",
        "Dataless Knowledge Fusion (Jin et al., 2023)",
        "2212.09849",
        {"method": "average"},
        {"kind": "gram", "off_diagonal": 0.9, "parameters": ("linear",)},
        {"method": "exact"},
    ),
    "mats": Method(
        "MaTS",
        "Experts are matched in their task parameter subspaces: a linear system solved by conjugate gradient from an "
        "initialization.",
        r"\sum_i w_i C_i\, \theta = \sum_i w_i C_i\, \theta_i",
        "Merging by Matching Models in Task Parameter Subspaces (Tam, Bansal & Raffel, 2024)",
        "2312.04339",
        {"method": "average"},
        {"kind": "kfac"},
        {"method": "cg", "iterations": 100},
    ),
}
"""Every named method. A new one is a row here (and, for a new initialization, an options class above)."""

IMPLIED_BY_CURVATURE: dict[str, dict[str, dict[str, Any]]] = {
    # Solved far, task vectors' own Grams need a regulariser; this one serves full checkpoints and LoRA adapters alike.
    "task_vector": {"curvature": {"normalization": "trace"}, "solver": {"iterations": 30, "damping": 1.0}},
}
"""What a kind of curvature implies, by part of a recipe, where nothing else is given."""

AUTO = "auto"
"""The method of a recipe that leaves the choice to what is there: MaTS with statistics, else `DATA_FREE_DEFAULT`."""

DATA_FREE_DEFAULT = "ties"
"""What is used when no method is named and the experts have no statistics."""
