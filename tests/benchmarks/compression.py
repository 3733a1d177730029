"""Several experts as one multi-task vector and a mask each: bytes, and how much of each expert's accuracy is kept.

    python tests/benchmarks/compression.py --experts EXPERTS --tasks TASKS --base BASE [--max-length 48]

EXPERTS and TASKS as for experts.py. λ is chosen for each task on its validation data; accuracies are of the test data.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import mats_hub
from mats_hub.expert import Expert
from mats_hub.loading import load_expert
from mats_hub.plan import human_bytes
from mats_hub.source import open_source
from mats_hub.suite import Suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--max-length", type=int, default=48)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = [folder.name for folder in sorted(arguments.experts.iterdir())]
    entries = {
        name: {**{part: str(arguments.tasks / name / f"{part}.jsonl") for part in ("validation", "test")}}
        | {"max_length": arguments.max_length}
        for name in names
    }
    suite, base = Suite.from_mapping(entries), str(arguments.base)
    experts = [str(arguments.experts / name) for name in names]
    alone = {}
    for name, folder in zip(names, experts, strict=True):
        expert = Expert(open_source(folder), name)
        model = load_expert(expert, open_source(base) if expert.adapter else None)
        alone[name] = suite.score(name, "test", model, base)
    print(f"experts alone: {alone}\n")
    print(
        f"| multi-task vector | {' | '.join(f'{name}: λ, test ÷ expert' for name in names)} | mean | bytes | full | as they are |"
    )
    print(f"|---|{'---|' * len(names)}---|---|---|---|")
    for vector in ("task_arithmetic", "ties"):
        for dtype in ("stored", "float16"):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary, "bundle")
                made = mats_hub.compress(experts, base=base, output=folder, vector=vector, tasks=suite, dtype=dtype)
                facts = made.report.bundle
                assert facts
                kept = {
                    name: suite.score(name, "test", mats_hub.load(folder, name, dtype="float32", base=base), base)
                    / alone[name]
                    for name in names
                }
            cells = " | ".join(f"{facts['tasks'][name]['mask_scale']:g}, {kept[name]:.3f}" for name in names)
            sizes = " | ".join(human_bytes(facts[key]) for key in ("bytes", "full_bytes", "expert_bytes"))
            print(f"| {vector}, {dtype} | {cells} | {sum(kept.values()) / len(kept):.3f} | {sizes} |", flush=True)


if __name__ == "__main__":
    main()
