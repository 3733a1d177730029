"""Intermediate-task merging: an expert merged with one of another task, to be better on its own task alone.

    python tests/benchmarks/intermediate.py --experts EXPERTS --tasks TASKS --base BASE --statistics FOLDER [--targets cr]

EXPERTS, TASKS and the statistics in FOLDER as for experts.py, which measures them. For each target and each other expert the
method and its settings are chosen on the target's validation data (`mats_hub.tune`, ``only=[target]``); accuracies are of its
test data. The other expert weighs less than the target's in all of them.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import mats_hub
from mats_hub.expert import Expert
from mats_hub.loading import load_expert
from mats_hub.source import open_source
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--targets", nargs="+")
    parser.add_argument("--max-length", type=int, default=48)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names, base = sorted(folder.name for folder in arguments.experts.iterdir()), str(arguments.base)
    entries = {
        name: {part: str(arguments.tasks / name / f"{part}.jsonl") for part in ("validation", "test")}
        | {"max_length": arguments.max_length}
        for name in names
    }
    suite = Suite.from_mapping(entries)
    print("| target | alone | with | chosen | validation, alone | validation | test |\n|---|---|---|---|---|---|---|")
    for target in arguments.targets or names:
        alone = expert_alone(arguments.experts / target, base, suite, target)
        for other in (name for name in names if name != target):
            pair = Suite.from_mapping({name: entries[name] for name in (target, other)})
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


def expert_alone(folder: Path, base: str, suite: Suite, target: str) -> dict[str, float]:
    """Return an expert's own score on both parts of its task's data."""
    expert = Expert(open_source(folder), target)
    model = load_expert(expert, open_source(base) if expert.adapter else None)
    return {part: suite.score(target, part, model, base) for part in ("validation", "test")}


if __name__ == "__main__":
    main()
