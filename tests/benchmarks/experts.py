"""Every method on real experts, its setting chosen on validation data: accuracy and the mean of merged ÷ expert.

    python tests/benchmarks/experts.py --experts EXPERTS --tasks TASKS --base BASE --output seed0.json [--only TEXT]
    python tests/benchmarks/experts.py --summary seed*.json [--figure methods.png]

EXPERTS holds a folder per expert, adapters or full checkpoints (train_experts.py trains such); TASKS a folder of the same name
with validation.jsonl and test.jsonl (text, label). Statistics are measured on the validation data, once, into --statistics.
Each method's chosen recipe is then merged once more in a process of its own: its time relative to the average's, and the peak
of memory above what the process held before. The summary is a table, the mean over the files of each method: one file for each
seed that experts were trained with.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from adapters import peak, reset_peak
from real_tasks import score_alone, tasks_of

import mats_hub
from mats_hub.candidates import Candidate, merge_candidates
from mats_hub.device import choose_device
from mats_hub.figures import draw_table
from mats_hub.suite import Suite


def grid(**options: list) -> list[dict]:
    return [dict(zip(options, values, strict=True)) for values in product(*options.values())]


KFAC = {"method": ["mats"], "curvature": ["kfac"]}
OWN = {"method": ["mats"], "curvature": ["task_vector"], "normalization": ["trace"]}
OWN |= {"initialization": ["task_arithmetic"], "scale": [0.4, 0.5, 0.6]}
DAMPED = {**KFAC, "preconditioner": ["kronecker"], "iterations": [30], "damping": [1.0, 0.1, 0.01, 0.001]}
METHODS: dict[str, list[dict]] = {
    "average": grid(method=["average"]),
    "task arithmetic": grid(method=["task_arithmetic"], scale=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
    "TIES": grid(method=["ties"], density=[0.1, 0.2, 0.5], scale=[0.7, 1.0, 1.5]),
    "DARE": grid(method=["dare"], density=[0.5], scale=[0.3, 0.5, 0.6]),
    "DARE-TIES": grid(method=["dare_ties"], density=[0.5], scale=[0.3, 0.5, 0.7]),
    "DELLA": grid(method=["della"], density=[0.5], scale=[0.3, 0.5, 0.7]),
    "Breadcrumbs": grid(method=["breadcrumbs"], density=[0.9], outliers=[0.01], scale=[0.3, 0.5, 0.7]),
    "Model Stock": grid(method=["model_stock"]),
    "TSV-M": grid(method=["tsvm"], scale=[0.6, 1.0, 1.4]),
    "Iso-C": grid(method=["iso_c"], scale=[0.3, 0.5, 1.0, 1.5, 2.0, 3.0]),
    "Iso-CTS": grid(method=["iso_cts"], scale=[0.3, 0.5, 1.0, 1.5, 2.0, 3.0]),
    "KnOTS-TIES": grid(method=["knots"], density=[0.2, 1.0], scale=[1.0, 1.5, 2.0]),
    "Consensus TA": grid(method=["consensus"], mask_scale=[[0.2], [0.4], [0.6]], scale=[0.3, 0.5, 0.7]),
    "Consensus TIES": grid(method=["consensus_ties"], mask_scale=[[0.2], [0.4], [0.6]], scale=[0.3, 0.5, 0.7]),
    "WUDI": grid(method=["wudi"], iterations=[1, 2, 5, 10]),
    "Fisher": grid(method=["fisher"], normalization=["none", "trace"]),
    "RegMean": grid(method=["regmean"], off_diagonal=[0.9, 1.0]),
    "MaTS, Gram, from average": grid(method=["mats"], curvature=["gram"], iterations=[10, 50, 100]),
    "MaTS, K-FAC, from average": grid(**KFAC, iterations=[20, 50, 100]),
    "MaTS, K-FAC, from task arithmetic": grid(
        **KFAC, initialization=["task_arithmetic"], scale=[0.3, 0.6], iterations=[20, 100]
    ),
    "MaTS, K-FAC, preconditioned, from average": grid(**KFAC, preconditioner=["kronecker"], iterations=[2, 5, 20, 50]),
    "MaTS, K-FAC, trace-normalized, from average": grid(**KFAC, normalization=["trace"], iterations=[50, 100]),
    "MaTS, K-FAC, trace-normalized, preconditioned": grid(
        **KFAC, normalization=["trace"], preconditioner=["kronecker"], iterations=[5, 20]
    ),
    "MaTS, task vectors' own Grams": grid(**OWN, iterations=[1, 2, 5, 20]),
    "MaTS, task vectors' own Grams, damped": grid(**OWN, iterations=[30], damping=[0.1, 1.0, 10.0]),
    "MaTS, K-FAC, damped, from average": grid(**DAMPED),
    "MaTS, K-FAC, damped, trace-normalized, from average": grid(**DAMPED, normalization=["trace"]),
    "MaTS as auto uses it": grid(method=["auto"]),
    "MaTS, K-FAC, damped, trace-normalized, from task arithmetic": grid(
        **DAMPED, normalization=["trace"], initialization=["task_arithmetic"], scale=[0.3, 0.5]
    ),
}
METHODS |= {
    f"MaTS, K-FAC, damped, trace-normalized, from {title}": grid(
        **{**DAMPED, "damping": [0.1, 0.01]}, normalization=["trace"], initialization=[name], scale=scales
    )
    for title, name, scales in (("Iso-C", "iso_c", [1.0, 2.0]), ("TSV-M", "tsvm", [0.6, 1.0]))
}

SKETCHED = {"for_adapter": True, "rank": 16}
WITHIN = {**KFAC, "subspace": ["factors"]}
BLOCK = {"method": ["mats"], "curvature": ["block_fisher"], "iterations": [3, 10, 30, 100]}
LORA_METHODS: dict[str, list[dict]] = {
    **METHODS,
    "RegMean, rank 8": grid(method=["regmean"], off_diagonal=[0.9, 1.0], rank=[8]),
    "MaTS, K-FAC, within the factors' span": grid(**WITHIN, iterations=[20, 50, 100]),
    "MaTS, K-FAC, within the factors' span, preconditioned": grid(
        **WITHIN, preconditioner=["kronecker"], iterations=[2, 5, 20]
    ),
    "RegMean, sketched Grams": grid(method=["regmean"], off_diagonal=[0.9, 1.0]),
    "MaTS, sketched Grams, from average": grid(method=["mats"], curvature=["gram"], iterations=[10, 50, 100]),
}
IA3_METHODS: dict[str, list[dict]] = {
    **{name: METHODS[name] for name in ("average", "task arithmetic", "TIES", "DARE", "Fisher")},
    "MaTS, block Fisher, from average": grid(**BLOCK),
    "MaTS, block Fisher, from task arithmetic": grid(
        **BLOCK, initialization=["task_arithmetic"], scale=[0.3, 0.4, 0.5, 0.6]
    ),
    "MaTS, block Fisher, from TIES": grid(**BLOCK, initialization=["ties"], scale=[1.0, 1.5]),
}
KINDS: dict[str, tuple[dict[str, dict], dict[str, list[dict]]]] = {
    "LORA": ({"": {"kind": ["kfac", "fisher"]}, "-sketch": SKETCHED}, LORA_METHODS),
    "IA3": ({"": {"kind": ["block_fisher", "fisher"]}}, IA3_METHODS),
    "full": ({"": {"kind": ["kfac", "fisher"]}}, METHODS),
}
"""Kind of expert → what is measured, by the ending of its files, and what is run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path)
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--statistics", type=Path, default=Path("statistics"))
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--only", default="", help="run only the methods whose name this expression is found in")
    parser.add_argument("--format", default="auto", help="what is merged into: adapter, full or auto")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--summary", type=Path, nargs="+", help="such files, to be summed up")
    parser.add_argument("--figure", type=Path, help="with --summary: a picture of the table")
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.job:
        print(json.dumps(merge_once(arguments.job)))
        return
    if arguments.summary:
        summarize(arguments.summary, arguments.figure)
        return
    bench = Benchmark(arguments)
    bench.measure()
    print(f"experts alone, test accuracy: {json.dumps(bench.alone)}", flush=True)
    chosen = {name: settings for name, settings in bench.methods.items() if re.search(arguments.only, name)}
    rows = [*bench.run("", chosen), *bench.run("-sketch", chosen)]
    if arguments.output:
        arguments.output.write_text(json.dumps({"alone": bench.alone, "rows": rows}, indent=1) + "\n")


class Benchmark:
    """Experts, their statistics and their own scores."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.base, self.statistics, self.max_length = arguments.base, arguments.statistics, arguments.max_length
        self.examples, self.format = arguments.examples, arguments.format
        self.tasks = {folder.name: arguments.tasks / folder.name for folder in sorted(arguments.experts.iterdir())}
        self.experts = {task: arguments.experts / task for task in self.tasks}
        self.suite = Suite.from_mapping(tasks_of(arguments))
        adapter = next(iter(self.experts.values())) / "adapter_config.json"
        kind = json.loads(adapter.read_text())["peft_type"] if adapter.exists() else "full"
        self.kinds, self.methods = KINDS[kind]
        self.alone = {task: round(score_alone(arguments, self.suite, task), 4) for task in self.tasks}

    def measure(self) -> None:
        for ending, options in self.kinds.items():
            for task, folder in self.tasks.items():
                options = options | (
                    {"base": str(self.base)} if (self.experts[task] / "adapter_config.json").exists() else {}
                )
                target = self.statistics / f"{task}{ending}.safetensors"
                if not target.exists():
                    mats_hub.compute_statistics(
                        self.experts[task], dataset=folder / "validation.jsonl", output=target,
                        examples=self.examples, max_length=self.max_length, **options,
                    )  # fmt: skip

    def run(self, ending: str, methods: dict[str, list[dict]]) -> list[dict]:
        """Merge with every setting, choose each method's on validation, and return what the chosen ones score on test."""
        methods = {name: held for name, held in methods.items() if ("sketched" in name) == bool(ending)}
        entries = [
            {"model": str(self.experts[task]), "statistics": str(self.statistics / f"{task}{ending}.safetensors")}
            for task in self.tasks
        ]
        common = {"base": str(self.base), "allow_other_base": True, "format": self.format}
        settings = [(name, setting) for name, held in methods.items() for setting in held]
        recipes = [mats_hub.Recipe.build(entries, **common, **setting) for _, setting in settings]
        found: dict[str, list[tuple[float, dict, mats_hub.Recipe]]] = {name: [] for name in methods}
        for number, value in self.scores(recipes, "validation"):
            name, setting = settings[number]
            found[name].append((self.mean(value), setting, recipes[number]))
            print(f"  {name} {setting}: validation {self.mean(value):.4f}", flush=True)
        best = {name: max(held, key=lambda one: one[0]) for name, held in found.items() if held}
        rows, average = [], cost_of(mats_hub.Recipe.build(entries, **common, method="average"))
        for number, test in self.scores([recipe for _, _, recipe in best.values()], "test"):
            name = list(best)[number]
            validation, setting, recipe = best[name]
            cost = cost_of(recipe)
            varied = [key for key in setting if len({str(s.get(key)) for s in methods[name]}) > 1]
            row = {
                "method": name,
                "setting": {key: setting[key] for key in varied},
                "validation": validation,
                "test": test,
                "accuracy": self.mean(test),
                "ratio": self.mean({task: value / self.alone[task] for task, value in test.items()}),
                "time": cost["seconds"] / average["seconds"],
                "memory": cost["memory"],
            }
            rows.append(row)
            print(f"{name}: {row['accuracy']:.4f}, {row['ratio']:.4f}, time {row['time']:.1f}", flush=True)
        return rows

    def scores(self, recipes: list, part: str) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the scores of each recipe's merge, in any order; one that cannot be merged is said and left out."""
        candidates = [Candidate(str(number), recipe) for number, recipe in enumerate(recipes)]
        with tempfile.TemporaryDirectory() as folder:
            for candidate in merge_candidates(candidates, Path(folder), choose_device()):
                if candidate.problem or candidate.folder is None:
                    print(f"  {candidate.recipe.method}: {candidate.problem}", flush=True)
                    continue
                scores = {}
                for task in self.tasks:
                    model = mats_hub.load(candidate.folder, task, base=str(self.base), dtype="float32")
                    scores[task] = self.suite.score(task, part, model, self.base)
                yield int(candidate.label), scores

    @staticmethod
    def mean(scores: dict[str, float]) -> float:
        return sum(scores.values()) / len(scores)


def cost_of(recipe: mats_hub.Recipe) -> dict[str, float]:
    """Return what `merge_once` finds in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        path.write_text(recipe.to_yaml())
        done = subprocess.run([sys.executable, __file__, "--job", path], check=True, capture_output=True, text=True)
        return json.loads(done.stdout.splitlines()[-1])


def merge_once(recipe: Path) -> dict[str, float]:
    """Return the seconds of a merge, and by how many MB memory rose."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = mats_hub.Recipe.load(recipe)
        mats_hub.merge(loaded.changed(method="average"))  # what a first merge imports is not this one's time
        started, before = time.perf_counter(), reset_peak()
        mats_hub.merge(loaded, output=Path(folder, "merged"))
        return {"seconds": time.perf_counter() - started, "memory": peak() - before}


def summarize(files: list[Path], figure: Path | None) -> None:
    """Print a row for each method: what was chosen, and the mean over the files with the standard deviation of the ratio."""
    contents = [json.loads(file.read_text()) for file in files]
    alone = {task: statistics.mean(c["alone"][task] for c in contents) for task in contents[0]["alone"]}
    print("alone: " + ", ".join(f"{task.upper()} {value:.3f}" for task, value in alone.items()))
    rows: dict[str, list[dict]] = {}
    for row in (row for content in contents for row in content["rows"]):
        rows.setdefault(row["method"], []).append(row)
    columns = (
        "method",
        "settings chosen",
        "validation",
        "test accuracy",
        "merged ÷ expert",
        "time ÷ average's",
        "memory",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    bars = {}
    for name, held in rows.items():
        settings = {
            key: sorted({str(row["setting"].get(key)).strip("[]'") for row in held}) for key in held[0]["setting"]
        }
        text = ", ".join(f"{key} {' / '.join(values)}" for key, values in settings.items()) or "–"
        means = [statistics.mean(row[key] for row in held) for key in ("validation", "accuracy", "ratio", "time")]
        spread = f" ± {statistics.stdev(row['ratio'] for row in held):.3f}" if len(held) > 1 else ""
        memory = max(row["memory"] for row in held)
        accuracy = f"{means[0]:.3f} | {means[1]:.3f} | {means[2]:.3f}{spread}"
        print(f"| {name} | {text} | {accuracy} | {means[3]:.1f} | {memory:.0f} MB |")
        bars[name] = means[2]
    if figure:
        draw_table(bars, "merged ÷ expert, test", figure)


if __name__ == "__main__":
    main()
