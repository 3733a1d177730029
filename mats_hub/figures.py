"""The figures of a merge's card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mats_hub.report import MergeReport


def draw_figures(report: MergeReport, folder: Path) -> list[str]:
    """Draw the figures that the report has numbers for, as PNG files, and return their names.

    convergence: relative residual against iterations, one line per solved weight.
    movement: norms of the task vectors of the experts, the initialization and the merged model, by weight.
    results: score of each model on each task.
    """
    drawn = {
        "convergence": _convergence if any(record.iterations for record in report.solved) else None,
        "movement": _movement if any(record.solution_norm is not None for record in report.tensors) else None,
        "results": _results if report.results else None,
    }
    names = []
    for name, draw in drawn.items():
        if draw:
            folder.mkdir(parents=True, exist_ok=True)
            _save(draw(report), folder / f"{name}.png")
            names.append(name)
    return names


MARGINS = {"left": 0.12, "right": 0.98, "bottom": 0.15, "top": 0.93}
"""Of the figures that every merge has: finding margins that fit takes longer than drawing them."""


def _figure(width: float, height: float, margins: Mapping[str, float] | None = None) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout=None if margins else "constrained")
    if margins:
        figure.subplots_adjust(**margins)
    FigureCanvasAgg(figure)  # no global state and no display, so that figures can be drawn in any thread
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})


def _convergence(report: MergeReport) -> Any:
    figure, axes = _figure(7, 3.6, MARGINS)
    histories = [record.residuals for record in report.solved if record.iterations]
    for history in histories:
        axes.plot(range(len(history)), history, color="#4c6ef5", alpha=0.25, linewidth=0.8)
    steps = max(len(history) for history in histories)
    middle = []
    for step in range(steps):
        values = sorted(history[min(step, len(history) - 1)] for history in histories)
        middle.append(values[len(values) // 2])
    axes.plot(range(steps), middle, color="#1b2a6b", linewidth=2, label=f"median of {len(histories)} weights")
    axes.set(yscale="log", xlabel="conjugate-gradient iterations", ylabel="‖b − A x‖ / ‖b‖")
    axes.legend(frameon=False)
    return figure


def _movement(report: MergeReport) -> Any:
    figure, axes = _figure(7, 3.6, MARGINS)
    records = [record for record in report.tensors if record.solution_norm is not None]
    positions = range(len(records))
    if len(records[0].expert_norms) > 1:
        low = [min(record.expert_norms) for record in records]
        high = [max(record.expert_norms) for record in records]
        axes.fill_between(positions, low, high, color="#adb5bd", alpha=0.5, step="mid", label="experts (range)")
    start = [record.initialization_norm for record in records]
    axes.step(positions, start, where="mid", color="#f08c00", linewidth=1.2, label="initialization")
    if report.solved:
        final = [record.solution_norm for record in records]
        axes.step(positions, final, where="mid", color="#1b2a6b", linewidth=1.2, label="merged model")
    axes.set(xlabel="merged tensors, in file order", ylabel="norm of the task vector", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.08)
    axes.legend(frameon=False)
    return figure


def _results(report: MergeReport) -> Any:
    tasks = list(dict.fromkeys(row["task"] for row in report.results))
    models = list(dict.fromkeys(row["model"] for row in report.results))
    scores = {(row["task"], row["model"]): row["value"] for row in report.results}
    figure, axes = _figure(max(6.0, 1.0 + 0.35 * len(tasks) * (len(models) + 1)), 3.6)
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        present = [(place, scores[task, model]) for place, task in enumerate(tasks) if (task, model) in scores]
        axes.bar(
            [p + (index - (len(models) - 1) / 2) * width for p, _ in present],
            [v for _, v in present],
            width,
            label=model,
        )
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(ylabel=report.results[0]["metric"], ylim=(0, 1) if max(scores.values()) <= 1 else (0, None))
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def draw_table(values: Mapping[str, float], label: str, path: Path) -> None:
    """Draw named numbers as horizontal bars from 0, in their order, into a PNG file."""
    figure, axes = _figure(7, 1.2 + 0.24 * len(values))
    positions = range(len(values))
    axes.barh(positions, list(values.values()), color="#4c6ef5")
    axes.set_yticks(positions, list(values), fontsize="small")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.25)
    axes.set(xlabel=label, xlim=(0, max(1.0, *values.values()) if values else 1))
    _save(figure, path)


def draw_heat_maps(
    maps: Mapping[str, tuple[Sequence[Sequence[float]], float, float, str]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: Path,
) -> None:
    """Draw matrices of the same rows and columns side by side into a PNG file: title → values, lowest, highest, colors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(max(7.0, 3.2 + 0.9 * len(columns) * len(maps)), 2.4 + 0.24 * len(rows)), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    for axes, (title, (values, low, high, colors)) in zip(
        figure.subplots(1, len(maps), sharey=True), maps.items(), strict=True
    ):
        image = axes.imshow(values, aspect="auto", cmap=colors, vmin=low, vmax=high)
        axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize="small")
        axes.set_yticks(range(len(rows)), rows, fontsize="small")
        axes.set_title(title, fontsize="medium")
        for row, line in enumerate(values if len(rows) * len(columns) <= 200 else ()):
            for column, value in enumerate(line):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small")
        figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, path)
