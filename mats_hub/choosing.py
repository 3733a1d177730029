"""Choosing a method and its settings by scores on validation data; results on test data."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mats_hub.candidates import Candidate, as_given, merge_candidates
from mats_hub.companions import companions_of
from mats_hub.device import choose_device
from mats_hub.errors import RecipeError, unknown
from mats_hub.figures import draw_table
from mats_hub.loading import load, load_expert
from mats_hub.merged_model import as_recipe
from mats_hub.methods import METHODS
from mats_hub.plan import Plan
from mats_hub.planning import make_plan
from mats_hub.progress import Progress
from mats_hub.recipe import Recipe
from mats_hub.scoring import relative
from mats_hub.suite import TEST, VALIDATION, Suite

GRIDS: dict[str, dict[str, list[Any]]] = {
    "task_arithmetic": {"scale": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]},
    "ties": {"density": [0.1, 0.2, 0.5], "scale": [0.7, 1.0, 1.5]},
    "dare": {"scale": [0.2, 0.3, 0.4, 0.5, 0.6]},
    "dare_ties": {"scale": [0.3, 0.5, 0.7]},
    "della": {"scale": [0.3, 0.5, 0.7]},
    "breadcrumbs": {"scale": [0.3, 0.5, 0.7]},
    "tsvm": {"scale": [0.6, 1.0, 1.4]},
    "iso_c": {"scale": [0.3, 0.5, 0.7, 1.0, 1.5]},
    "iso_cts": {"scale": [0.3, 0.5, 0.7, 1.0, 1.5]},
    "knots": {"scale": [0.7, 1.0, 1.5]},
    "consensus": {"mask_scale": [(0.2,), (0.4,), (0.6,)], "scale": [0.3, 0.5, 0.7]},
}
"""What is tried of an initialization that is a method by itself, about the values of its paper."""

STEPS = [1, 2, 5, 10, 20, 30, 50, 70, 100]
DAMPINGS = [0.001, 0.01, 0.1, 1.0]


def default_grid(recipe: Recipe) -> dict[str, list[Any]]:
    """Return option → values to try for a recipe: what matters most to its method."""
    solver = recipe.solver
    if solver is None:
        return GRIDS.get(recipe.initialization.method, {})
    if solver.method == "exact":
        return {"off_diagonal": [0.5, 0.9, 1.0]} if recipe.curvature and recipe.curvature.kind == "gram" else {}
    if solver.damping:
        return {"damping": DAMPINGS}
    return {"iterations": STEPS}


@dataclass
class Choice:
    """Candidates with their scores.

    Attributes:
        candidates: in the order they were tried.
        which: the part of the data they were scored on.
        metrics: task → metric.
        experts: task → the score of the task's own expert, on the same data.
        names: the tasks.

    """

    candidates: list[Candidate]
    which: str
    metrics: dict[str, str]
    experts: dict[str, float]

    def mean(self, candidate: Candidate) -> float:
        """Return the mean over the tasks of merged ÷ expert (its inverse for losses); NaN for what could not be merged."""
        values = [relative(v, self.experts[t], self.metrics[t]) for t, v in candidate.scores.items()]
        return sum(values) / len(values) if values else math.nan

    @property
    def best(self) -> Candidate:
        """The candidate of the highest mean; the first of several.

        Raises:
            RecipeError: none could be merged.

        """
        able = [c for c in self.candidates if not c.problem and not math.isnan(self.mean(c))]
        if not able:
            reasons = "; ".join(dict.fromkeys(c.problem for c in self.candidates))
            raise RecipeError(f"no candidate could be merged: {reasons}")
        return max(able, key=self.mean)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per candidate: label, scores, mean, and why it could not be merged."""
        return [
            {"label": c.label, **c.scores, "merged ÷ expert": None if c.problem else self.mean(c), "problem": c.problem}
            for c in self.candidates
        ]

    def __str__(self) -> str:
        tasks = list(self.metrics)
        head = ["", *(f"{task} ({self.metrics[task]})" for task in tasks), "merged ÷ expert"]
        lines = [head, ["experts", *(f"{self.experts[task]:.3f}" for task in tasks), "1.000"]]
        for candidate in self.candidates:
            if not candidate.problem:
                scores = [f"{candidate.scores[task]:.3f}" for task in tasks]
                lines.append([candidate.label, *scores, f"{self.mean(candidate):.3f}"])
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*text, *(f"{c.label}: not merged, {c.problem}" for c in self.candidates if c.problem)])

    def save(self, folder: str | Path) -> Path:
        """Write the best recipe, the whole table and a figure of it into a folder; return the recipe's path."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        content = {"part": self.which, "metrics": self.metrics, "experts": self.experts, "candidates": self.rows()}
        (target / "scores.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        means = {c.label: self.mean(c) for c in self.candidates if not c.problem}
        draw_table(means, "merged ÷ expert", target / "scores.png")
        (target / "best.yaml").write_text(self.best.recipe.to_yaml(), encoding="utf-8")
        return target / "best.yaml"


def tune(
    recipe: Recipe | Sequence[Any] | str | Path,
    tasks: Suite | Mapping[str, Any] | str | Path,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    only: Sequence[str] = (),
    device: str = "auto",
    token: str | bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Choice:
    """Try settings of a recipe on the validation part of its experts' tasks; the test part is not opened.

    Task vectors and statistics are read once for all candidates, and one run of conjugate gradient serves every number of
    iterations.

    Args:
        recipe: what to merge: as for `mats_hub.merge`.
        tasks: the experts' tasks by their names (`Suite`), a mapping, or a file of them.
        grid: option → values, all combinations of which are tried; `default_grid` otherwise.
        only: tasks that count, where not all do: a target expert helped by others (intermediate-task merging, the second
            setting of the MaTS paper).
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        token: Hub token; the one stored on this machine otherwise.
        progress: wraps the iteration over tensors.
        **options: recipe options when `recipe` is a list of experts.

    Raises:
        RecipeError: an option or a task that cannot be.
        PlanError: what stands in the way of the merge.

    """
    start = as_recipe(recipe, **options)
    plan = make_plan(start, token)
    plan.raise_problems()
    resolved = start if start.method != "auto" else as_given(plan)
    values = {name: list(held) for name, held in (grid or default_grid(resolved)).items()}
    settings = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    candidates = [Candidate(_label(setting) or resolved.method, resolved.changed(**setting)) for setting in settings]
    return _scored(candidates, plan, tasks, VALIDATION, only, device, token, progress)


def compare(
    experts: Recipe | Sequence[Any] | str | Path,
    tasks: Suite | Mapping[str, Any] | str | Path,
    *,
    methods: Sequence[str] = (),
    tuned: bool = False,
    part: str = VALIDATION,
    device: str = "auto",
    token: str | bool | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Choice:
    """Merge the same experts by several methods, on one reading of them, and score each.

    Args:
        experts: a recipe or experts, as for `mats_hub.merge`; its own method counts for nothing.
        tasks: the experts' tasks by their names.
        methods: names of methods; all when empty. Those that cannot be used here are in the table with the reason.
        tuned: whether each method's settings are chosen on the validation part first.
        part: what is scored on in the end: ``validation`` or ``test``.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        token: Hub token; the one stored on this machine otherwise.
        progress: wraps the iteration over tensors.
        **options: recipe options when `experts` is a list.

    """
    start = as_recipe(experts, **options)
    for name in methods:
        if name not in METHODS:
            raise RecipeError(unknown("method", name, METHODS))
    plan = make_plan(start.changed(method="average"), token)
    plan.raise_problems()
    candidates = []
    for name in methods or METHODS:
        recipe = start.changed(method=name)
        if tuned and not make_plan(recipe, token).problems:
            choice = tune(recipe, tasks, device=device, token=token, progress=progress)
            if not all(candidate.problem for candidate in choice.candidates):
                best = choice.best
                label = f"{name} ({best.label})" if best.label != name else name
                candidates.append(Candidate(label, best.recipe))
                continue
        candidates.append(Candidate(name, recipe))
    return _scored(candidates, plan, tasks, part, (), device, token, progress)


def evaluate_tasks(
    model: str | Path,
    tasks: Suite | Mapping[str, Any] | str | Path,
    *,
    part: str = TEST,
    experts: Mapping[str, str | Path] | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    token: str | None = None,
) -> list[dict[str, Any]]:
    """Score a merged model on tasks, beside the tasks' own experts.

    Args:
        model: a merged model: a folder or Hub id; its tasks are the file's.
        tasks: the tasks by their names.
        part: ``test`` or ``validation``.
        experts: task → the expert to compare with.
        base: the base of adapters, when it is not the one they name.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        token: Hub token; the one stored on this machine otherwise.

    Returns:
        Rows for `MergedModel.add_results`: task, metric, model, value, and dataset where it is on the Hub.

    """
    from mats_hub.loading import task_names
    from mats_hub.source import open_source

    suite, source, rows = as_suite(tasks), open_source(model, token), []
    own = task_names(source)
    for name in suite:
        entry = suite[name]
        facts = {"task": name, "metric": entry.metric}
        facts |= {"dataset": found} if (found := suite.hub_id(name)) else {}
        facts |= {"task_id": entry.task_id} if entry.task_id else {}
        network = load(model, name if name in own else None, dtype="float32", token=token, base=base)
        rows.append({**facts, "model": "merged", "value": suite.score(name, part, network, model, device, token)})
        if experts and name in experts:
            network = load(experts[name], dtype="float32", token=token, base=base)
            processor = _processor(experts[name], model, token)
            rows.append(
                {**facts, "model": "expert", "value": suite.score(name, part, network, processor, device, token, base)}
            )
    return rows


def _processor(expert: str | Path, model: str | Path, token: Any) -> str | Path:
    from mats_hub.source import open_source

    return expert if companions_of(open_source(expert, token)) else model


def as_suite(tasks: Suite | Mapping[str, Any] | str | Path) -> Suite:
    """Return the tasks that a file, a mapping or a suite describes."""
    if isinstance(tasks, Suite):
        return tasks
    return Suite.load(tasks) if isinstance(tasks, str | Path) else Suite.from_mapping(tasks)


def _scored(
    candidates: list[Candidate],
    plan: Plan,
    tasks: Suite | Mapping[str, Any] | str | Path,
    part: str,
    only: Sequence[str],
    device: str,
    token: Any,
    progress: Progress | None,
) -> Choice:
    suite = as_suite(tasks)
    names = {expert.name: expert for expert in plan.experts}
    for name in (*only, *suite):
        if name not in names:
            raise RecipeError(f"the tasks: {unknown('expert', name, names)}")
    counted = [name for name in suite if not only or name in only]
    place = choose_device(device)
    base = plan.base.source if plan.base else None
    spec = str(base.folder or base.public_spec) if base else None
    experts = {}
    for name in counted:
        expert = names[name]
        processor = _processor(str(expert.source.folder or expert.source.public_spec), spec or "", token)
        network = load_expert(expert, base)
        experts[name] = suite.score(name, part, network, processor, str(place), token, spec)
    with tempfile.TemporaryDirectory(prefix="mats_hub-") as folder:
        for candidate in merge_candidates(candidates, Path(folder), place, token, progress):
            if candidate.problem or candidate.folder is None:
                continue
            for name in counted:
                kept = any(plan.kept.values())
                network = load(candidate.folder, name if kept else None, dtype="float32", base=spec)
                candidate.scores[name] = suite.score(name, part, network, candidate.folder, str(place), token)
    return Choice(candidates, part, {name: suite[name].metric for name in counted}, experts)


def _label(setting: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Iterable) and not isinstance(value, str):
            return " ".join(map(text, value))
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(value)}" for name, value in setting.items())


def harness(model: str | Path, tasks: Sequence[str], device: str = "auto") -> list[dict[str, Any]]:
    """Score a causal language model by lm-evaluation-harness, which has to be installed (``pip install lm-eval``).

    Args:
        model: a folder or a Hub id.
        tasks: names of its tasks, or YAML files of tasks of one's own.
        device: where to compute.

    Returns:
        Rows for `MergedModel.add_results`, one per task and metric.

    Raises:
        RecipeError: it is not installed.

    """
    try:
        import lm_eval
    except ModuleNotFoundError:
        raise RecipeError(
            "lm-evaluation-harness is not installed; install it with pip install 'mats-hub[lm-eval]'"
        ) from None
    place = str(choose_device(device))
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(model)}, tasks=list(tasks), device=place, batch_size="auto"
    )
    rows = []
    for task, values in found["results"].items():
        for name, value in values.items():
            metric = name.removesuffix(",none")
            if isinstance(value, int | float) and "stderr" not in name and metric != "sample_len":
                rows.append({"task": task, "metric": metric, "model": "merged", "value": float(value)})
    return rows
