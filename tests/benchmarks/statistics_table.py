"""What statistics cost and what they are worth: kind, storage and rank against size, time to measure and merged accuracy.

    python tests/benchmarks/statistics_table.py --experts EXPERTS --tasks TASKS --base BASE [--folder FOLDER] [--parameters]

EXPERTS and TASKS as for experts.py. Every row measures statistics of all experts on their validation data and merges them; time
is of the measuring, relative to the first row, in the same run. With --parameters the rows are the kinds of parameters that
are matched instead, which for full checkpoints are all there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from experts import Benchmark

import mats_hub
from mats_hub.recipe import PARAMETERS

MERGES = {
    "gram": {"method": "regmean", "off_diagonal": 0.9},
    "kfac": {"method": "mats", "curvature": "kfac", "preconditioner": "kronecker", "iterations": 5},
}
ROWS: list[dict[str, Any]] = [
    {"kind": kind, "storage": storage, "rank": rank}
    for kind in MERGES
    for storage, rank in [
        *(("float32", None), ("float16", None), ("bfloat16", None)),
        *(("float32", 16), ("float32", 64), ("float16", 64), ("float16", 256)),
    ]
]
MATCHED: dict[str, dict[str, Any]] = {
    "Gram, exact": {"method": "mats", "curvature": "gram", "off_diagonal": 0.9, "solver": "exact"},
    "K-FAC, damped": {**MERGES["kfac"], "normalization": "trace", "iterations": 30, "damping": 0.001},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="keep the statistics there")
    parser.add_argument("--max-length", type=int, default=48)
    parser.add_argument("--examples", type=int, default=400)
    parser.add_argument("--parameters", action="store_true")
    arguments = parser.parse_args()
    arguments.statistics, arguments.format = None, "auto"
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        bench = Benchmark(arguments)
        print(f"experts alone, test accuracy: {json.dumps(bench.alone)}", flush=True)
        if arguments.parameters:
            compare_parameters(bench, arguments.folder)
        else:
            compare_storage(bench, arguments.folder)


def measure(bench: Benchmark, folder: Path, **options: Any) -> tuple[list[dict[str, str]], float, float]:
    """Return the entries of all experts with their statistics, the seconds it took and the megabytes they take."""
    name = "-".join(str(value) for value in options.values())
    entries, size, started = [], 0, time.perf_counter()
    for task, expert in bench.experts.items():
        target = folder / f"{task}-{name}.safetensors"
        data = bench.tasks[task] / "validation.jsonl"
        base = str(bench.base) if (expert / "adapter_config.json").exists() else None
        if not target.exists():
            mats_hub.compute_statistics(
                expert,
                base=base,
                dataset=data,
                output=target,
                examples=bench.examples,
                max_length=bench.max_length,
                **options,
            )
        size += target.stat().st_size
        entries.append({"model": str(expert), "name": task, "statistics": str(target)})
    return entries, time.perf_counter() - started, size / 1e6


def score(bench: Benchmark, entries: list[dict[str, str]], **options: Any) -> tuple[float, float]:
    merged = mats_hub.merge(entries, base=str(bench.base), allow_other_base=True, **options)
    test = bench.score(merged, "test")
    return bench.mean(test), bench.mean({task: value / bench.alone[task] for task, value in test.items()})


def compare_storage(bench: Benchmark, folder: Path) -> None:
    print("| kind | storage | rank | MB for all | time to measure | test accuracy | merged ÷ expert |")
    print("|---|---|---|---|---|---|---|")
    first = None
    for row in ROWS:
        entries, seconds, megabytes = measure(bench, folder, **row)
        first = first or seconds
        accuracy, ratio = score(bench, entries, **MERGES[row["kind"]])
        print(
            f"| {row['kind']} | {row['storage']} | {row['rank'] or '–'} | {megabytes:.1f} | {seconds / first:.2f} "
            f"| {accuracy:.3f} | {ratio:.3f} |",
            flush=True,
        )


def compare_parameters(bench: Benchmark, folder: Path) -> None:
    entries, _, _ = measure(bench, folder, kind="kfac")
    matched = {"linear": ("linear",), **{f"linear, {k}": ("linear", k) for k in ("bias", "norm", "embedding")}}
    matched["all"] = PARAMETERS
    print("| matched | " + " | ".join(MATCHED) + " |")
    print("|---|" + "---|" * len(MATCHED))
    for name, parameters in matched.items():
        scores = (score(bench, entries, parameters=parameters, **options) for options in MATCHED.values())
        cells = [f"{accuracy:.3f} ({ratio:.3f})" for accuracy, ratio in scores]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
