"""Intermediate-task merging: an expert merged with one of another task, to be better on its own task alone.

    python tests/benchmarks/intermediate.py --experts EXPERTS --tasks TASKS --base BASE --statistics FOLDER [--targets cr]

EXPERTS, TASKS and the statistics in FOLDER as for experts.py, which measures them. For each target and each other expert the
method and its settings are chosen on the target's validation data (`mats_hub.tune`, ``only=[target]``); accuracies are of its
test data. The other expert weighs less than the target's in all of them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from real_tasks import parser, score_alone, tasks_of

import mats_hub
from mats_hub.suite import Suite

METHODS = {
    "average": ({"method": "average"}, {}),
    "task arithmetic": ({"method": "task_arithmetic"}, {"scale": [0.6, 0.8, 1.0]}),
    "TIES": ({"method": "ties"}, {"density": [0.2, 0.5], "scale": [0.8, 1.0]}),
    "MaTS, Gram": ({"method": "mats", "curvature": "gram"}, {"iterations": [10, 100]}),
}
WEIGHTS = (0.1, 0.3)
"""Of the other expert, where the target's is 1."""


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--statistics", type=Path, required=True)
    options.add_argument("--targets", nargs="+")
    arguments = options.parse_args()
    warnings.simplefilter("ignore")
    tasks, base = tasks_of(arguments), str(arguments.base)
    names, suite = list(tasks), Suite.from_mapping(tasks)
    print("| target | alone | with | chosen | validation, alone | validation | test |\n|---|---|---|---|---|---|---|")
    for target in arguments.targets or names:
        alone = {part: score_alone(arguments, suite, target, part) for part in ("validation", "test")}
        for other in (name for name in names if name != target):
            pair = Suite.from_mapping({name: tasks[name] for name in (target, other)})
            best, setting, score = None, "the target alone", alone["validation"]
            for title, (options, grid) in METHODS.items():
                for weight in WEIGHTS:
                    experts = [
                        {
                            "model": str(arguments.experts / name),
                            "weight": share,
                            "statistics": str(arguments.statistics / f"{name}.safetensors"),
                        }
                        for name, share in ((target, 1.0), (other, weight))
                    ]
                    recipe = mats_hub.Recipe.build(experts, base=base, **options)
                    choice = mats_hub.tune(recipe, pair, grid=grid or {"seed": [0]}, only=[target])
                    found = choice.best.scores[target]
                    if found > score:
                        best, score = choice.best, found
                        setting = f"{title}, {weight:g} × {other}, {choice.best.label}"
            test = alone["test"]
            if best:
                merged = mats_hub.merge(best.recipe)
                model = mats_hub.load(merged.folder, target, base=base, dtype="float32")
                test = suite.score(target, "test", model, base)
            cells = (
                f"{alone['test']:.3f}",
                other,
                setting,
                f"{alone['validation']:.3f}",
                f"{score:.3f}",
                f"{test:.3f}",
            )
            print(f"| {target} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
