"""What benchmarks on real experts share: their options, their tasks' data, and each expert's own score."""

from __future__ import annotations

import argparse
from pathlib import Path

from mats_hub.expert import Expert
from mats_hub.loading import load_expert
from mats_hub.source import open_source
from mats_hub.suite import Suite


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that say where experts, data and base are."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--experts", type=Path, required=True, help="a folder with one per expert")
    made.add_argument("--tasks", type=Path, required=True, help="a folder with one per task, called like its expert")
    made.add_argument("--base", type=Path, required=True)
    made.add_argument("--max-length", type=int, default=48)
    return made


def tasks_of(arguments: argparse.Namespace) -> dict[str, dict[str, str | int]]:
    """Return each expert's task as a tasks file has it: validation.jsonl and test.jsonl (text, label)."""
    return {
        folder.name: {part: str(arguments.tasks / folder.name / f"{part}.jsonl") for part in ("validation", "test")}
        | {"max_length": arguments.max_length}
        for folder in sorted(arguments.experts.iterdir())
    }


def score_alone(arguments: argparse.Namespace, suite: Suite, task: str, part: str = "test") -> float:
    """Return an expert's own score on its task's data."""
    expert, base = Expert(open_source(arguments.experts / task), task), str(arguments.base)
    model = load_expert(expert, open_source(base) if expert.adapter else None)
    return suite.score(task, part, model, base)
