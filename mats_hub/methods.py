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
    "dare_ties": Method(
        "DARE-TIES",
        "Entries of the task vectors are dropped at random and the rest rescaled; those that agree with the elected sign are "
        "summed.",
        r"\theta = \theta_0 + \lambda \sum_{i:\, \mathrm{sign}(\hat\tau_i) = \gamma} w_i \, \hat\tau_i, \quad "
        r"\hat\tau_i = \frac{m_i \odot (\theta_i - \theta_0)}{p}",
        "Language Models are Super Mario (Yu et al., 2024)",
        "2311.03099",
        {"method": "dare_ties"},
    ),
    "della": Method(
        "DELLA",
        "Small entries of the task vectors are dropped more often than large ones and the rest rescaled; those that agree with "
        "the elected sign are summed.",
        r"\theta = \theta_0 + \lambda \sum_{i:\, \mathrm{sign}(\hat\tau_i) = \gamma} w_i \, \hat\tau_i, \quad "
        r"\hat\tau_i = \frac{m_i \odot (\theta_i - \theta_0)}{p_i}",
        "DELLA-Merging (Deep et al., 2024)",
        "2406.11617",
        {"method": "della"},
    ),
    "breadcrumbs": Method(
        "Model Breadcrumbs",
        "The largest and the smallest entries of the task vectors are left out, the rest is summed.",
        r"\theta = \theta_0 + \lambda \sum_i w_i \, m_i \odot (\theta_i - \theta_0)",
        "Model Breadcrumbs (Davari & Belilovsky, 2023)",
        "2312.06795",
        {"method": "breadcrumbs"},
    ),
    "slerp": Method(
        "SLERP",
        "Two experts are interpolated along the arc between their weights.",
        r"\theta = \frac{\sin((1 - t)\varphi)}{\sin \varphi}\, \theta_1 + \frac{\sin(t \varphi)}{\sin \varphi}\, \theta_2",
        "Model soups (Wortsman et al., 2022), along the arc of Shoemake (1985)",
        "2203.05482",
        {"method": "slerp"},
    ),
    "model_stock": Method(
        "Model Stock",
        "The average, drawn towards the base by the angle between the task vectors.",
        r"\theta = \theta_0 + t\, (\bar\theta - \theta_0), \quad t = \frac{N \cos\varphi}{1 + (N - 1) \cos\varphi}",
        "Model Stock: All we need is just a few fine-tuned models (Jang et al., 2024)",
        "2403.19522",
        {"method": "model_stock"},
    ),
    "tsvm": Method(
        "TSV-M",
        "The largest singular directions of each task vector are made orthogonal to the other tasks' and added up.",
        r"\theta = \theta_0 + \lambda\, U_\perp \Sigma V_\perp^\top",
        "Task Singular Vectors (Gargiulo et al., 2024)",
        "2412.00081",
        {"method": "tsvm"},
    ),
    "iso_c": Method(
        "Iso-C",
        "The sum of the task vectors with all its singular values made equal.",
        r"\theta = \theta_0 + \lambda\, \bar\sigma\, U V^\top, \quad U \Sigma V^\top = \sum_i w_i (\theta_i - \theta_0)",
        "No Task Left Behind: Isotropic Model Merging (Marczak et al., 2025)",
        "2502.04959",
        {"method": "iso_c"},
    ),
    "iso_cts": Method(
        "Iso-CTS",
        "Directions that the tasks share and directions of each task, with all singular values made equal.",
        r"\theta = \theta_0 + \lambda\, \bar\sigma\, U_\perp V_\perp^\top",
        "No Task Left Behind: Isotropic Model Merging (Marczak et al., 2025)",
        "2502.04959",
        {"method": "iso_cts"},
    ),
    "knots": Method(
        "KnOTS",
        "TIES in the basis of singular directions that the task vectors share; meant for LoRA.",
        r"\theta = \theta_0 + \lambda\, U\, \mathrm{TIES}(\Sigma V_1^\top, \ldots, \Sigma V_n^\top), \quad "
        r"U \Sigma [V_1^\top \cdots V_n^\top] = [\tau_1 \cdots \tau_n]",
        "Model Merging with SVD to Tie the Knots (Stoica et al., 2024)",
        "2410.19735",
        {"method": "knots"},
    ),
    "consensus": Method(
        "Consensus Task Arithmetic",
        "The sum of the task vectors without the entries that fewer than two tasks use.",
        r"\theta = \theta_0 + \lambda\, \Big[\sum_i m_i \ge k\Big] \odot \tau, \quad m_i = |\tau_i| > \lambda_i |\tau - \tau_i|",
        "Localizing Task Information for Improved Model Merging and Compression (Wang et al., 2024)",
        "2405.07813",
        {"method": "consensus"},
    ),
    "consensus_ties": Method(
        "Consensus TIES",
        "What TIES elects, without the entries that fewer than two tasks use.",
        r"\theta = \theta_0 + \lambda\, \Big[\sum_i m_i \ge k\Big] \odot \tau, \quad m_i = |\tau_i| > \lambda_i |\tau - \tau_i|",
        "Localizing Task Information for Improved Model Merging and Compression (Wang et al., 2024)",
        "2405.07813",
        {"method": "consensus", "vector": "ties"},
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
    "wudi": Method(
        "WUDI",
        "Experts are matched on the directions of their own task vectors, from their sum; needs no statistics.",
        r"\tau \sum_i w_i C_i = \sum_i w_i \tau_i C_i, \quad "
        r"C_i = \frac{\tau_i^\top \tau_i}{\|\tau_i\|_F^2}",
        "Whoever Started the Interference Should End It (Cheng et al., 2025)",
        "2503.08099",
        {"method": "task_arithmetic", "scale": 1.0},
        {"kind": "task_vector", "normalization": "trace"},
        {"method": "cg", "iterations": 10},
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
"""The method of a recipe that leaves the choice to what is there: the first row of `DEFAULTS` that fits."""


@dataclass(frozen=True)
class Default:
    """What is used when no method is named.

    Attributes:
        fact: what has to be there: statistics of a kind for every expert, or how the experts are.
        because: the same in words.
        settings: the recipe's method and parts.

    """

    fact: str
    because: str
    settings: Mapping[str, Any]


FULL, ADAPTERS, NO_BASE = "full checkpoints", "adapters", "no base"

DEFAULTS = (
    Default(
        "kfac",
        "every expert has K-FAC statistics (damped, preconditioned and normalized: the setting that was good on all experts)",
        {
            "method": "mats",
            "curvature": {"kind": "kfac", "normalization": "trace"},
            "solver": {"preconditioner": "kronecker", "damping": 0.01, "iterations": 30, "tolerance": 0.01},
        },
    ),
    Default(
        "gram",
        "every expert has Gram statistics, whose system has a closed form",
        {"method": "mats", "curvature": {"kind": "gram"}, "solver": {"method": "exact"}},
    ),
    Default(
        "block_fisher",
        "every expert has block Fisher statistics",
        {"method": "mats", "curvature": {"kind": "block_fisher"}},
    ),
    Default(
        "fisher", "every expert has Fisher statistics", {"method": "fisher", "curvature": {"normalization": "trace"}}
    ),
    Default(NO_BASE, "without statistics and without a base nothing else can be done", {"method": "average"}),
    Default(
        FULL,
        "there are no statistics, and full checkpoints' own task vectors tell which directions matter",
        {
            "method": "mats",
            "curvature": {"kind": "task_vector"},
            "initialization": {"method": "task_arithmetic"},
            "solver": {"tolerance": 0.01},
        },
    ),
    Default(
        ADAPTERS,
        "there are no statistics, and adapters' task vectors tell little more than TIES uses",
        {"method": "ties"},
    ),
)
"""The decision table of method ``auto``, the first row that fits; README has the measurements behind it."""
