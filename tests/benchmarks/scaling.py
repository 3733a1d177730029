"""Accuracy and time against the number of experts merged: 2, 3, 4, …, in the order of their names.

    python tests/benchmarks/scaling.py --experts EXPERTS --tasks TASKS --base BASE --statistics FOLDER [--figure scaling.png]

EXPERTS, TASKS and the statistics in FOLDER as for experts.py, which measures them. Settings are not tuned for each number: task
arithmetic 0.5, TIES and RegMean as they are, MaTS as method auto uses it. Accuracy is the mean over the merged experts' tasks of
merged ÷ expert on test data; time is of the merge alone, relative to the average of two.
"""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path

from real_tasks import parser, score_alone, tasks_of

import mats_hub
from mats_hub.methods import DEFAULTS
from mats_hub.suite import Suite

METHODS = {
    "average": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic", "scale": 0.5},
    "TIES": {"method": "ties"},
    "RegMean": {"method": "regmean", "off_diagonal": 1.0},
    "MaTS": {key: dict(value) if key != "method" else value for key, value in DEFAULTS[0].settings.items()},
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--statistics", type=Path, required=True)
    options.add_argument("--runs", type=int, default=3, help="the least time of so many merges counts")
    options.add_argument("--figure", type=Path)
    arguments = options.parse_args()
    warnings.simplefilter("ignore")
    tasks, base = tasks_of(arguments), str(arguments.base)
    names, suite = list(tasks), Suite.from_mapping(tasks)
    alone = {name: score_alone(arguments, suite, name) for name in names}
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in METHODS}
    unit = None
    print("| experts | " + " | ".join(f"{name}: merged ÷ expert, time" for name in METHODS) + " |")
    print("|---|" + "---|" * len(METHODS))
    for count in range(2, len(names) + 1):
        cells = []
        for title, options in METHODS.items():
            entries = [
                {"model": str(arguments.experts / n), "statistics": str(arguments.statistics / f"{n}.safetensors")}
                for n in names[:count]
            ]
            seconds = math.inf
            for _ in range(arguments.runs):
                started = time.perf_counter()
                merged = mats_hub.merge(entries, base=base, device="cpu", **options)
                seconds = min(seconds, time.perf_counter() - started)
            unit = unit or seconds
            ratios = [
                suite.score(n, "test", mats_hub.load(merged.folder, n, base=base, dtype="float32"), base) / alone[n]
                for n in names[:count]
            ]
            mean = sum(ratios) / count
            found[title].append((count, mean, seconds / unit))
            cells.append(f"{mean:.3f}, {seconds / unit:.1f}")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)
    if arguments.figure:
        draw(found, arguments.figure)


def draw(found: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for title, points in found.items():
        counts, means, times = zip(*points, strict=True)
        left.plot(counts, means, marker="o", label=title)
        right.plot(counts, times, marker="o")
    left.set(xlabel="experts merged", ylabel="merged ÷ expert, test", xticks=counts)
    right.set(xlabel="experts merged", ylabel="time ÷ average of two", yscale="log", xticks=counts)
    left.legend(frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main()
