"""Several experts as one multi-task vector and a mask each: bytes, and how much of each expert's accuracy is kept.

    python tests/benchmarks/compression.py --experts EXPERTS --tasks TASKS --base BASE [--max-length 48]

EXPERTS and TASKS as for experts.py. λ is chosen for each task on its validation data; accuracies are of the test data.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from real_tasks import parser, score_alone, tasks_of

import mats_hub
from mats_hub.plan import human_bytes
from mats_hub.suite import Suite


def main() -> None:
    arguments = parser(__doc__).parse_args()
    warnings.simplefilter("ignore")
    tasks, base = tasks_of(arguments), str(arguments.base)
    names, suite = list(tasks), Suite.from_mapping(tasks)
    experts = [str(arguments.experts / name) for name in names]
    alone = {name: score_alone(arguments, suite, name) for name in names}
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
