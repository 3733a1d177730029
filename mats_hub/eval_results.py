"""Results on registered benchmarks, as the files that the Hub makes leaderboards of."""

from __future__ import annotations

from typing import Any

import yaml

from mats_hub.errors import MatsError
from mats_hub.hub_client import hub_api, hub_errors, persistently
from mats_hub.hub_id import HUB_ID
from mats_hub.report import MERGED, MergeReport

FOLDER = ".eval_results"
REGISTRATION = "eval.yaml"


def eval_result_files(report: MergeReport, token: str | bool | None = None) -> dict[str, bytes]:
    """Return path → content of the files for those of the merged model's results that are on registered benchmarks.

    A row counts whose ``dataset`` is a data set on the Hub that has an ``eval.yaml`` in which its ``task_id`` is a task; all
    other results stay in the card's model-index. See https://huggingface.co/docs/hub/eval-results.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    entries: dict[str, list[Any]] = {}
    for row in report.results:
        dataset, _, revision = str(row.get("dataset", "")).partition("@")
        if row["model"] != MERGED or not row.get("task_id") or not HUB_ID.match(dataset):
            continue
        if row["task_id"] in _tasks_of(dataset, token):
            entry = EvalResultEntry(dataset, row["task_id"], row["value"], dataset_revision=revision or None)
            entries.setdefault(dataset.replace("/", "--"), []).append(entry)
    return {
        f"{FOLDER}/{name}.yaml": yaml.safe_dump(eval_result_entries_to_yaml(held), sort_keys=False).encode()
        for name, held in entries.items()
    }


def _tasks_of(dataset: str, token: str | bool | None) -> set[str]:
    """Return the tasks of a registered benchmark; none for any other data set, or one that cannot be read."""
    api = hub_api(token)
    try:
        with hub_errors(dataset):
            path = persistently(lambda: api.hf_hub_download(dataset, REGISTRATION, repo_type="dataset"))
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
    except (MatsError, yaml.YAMLError):
        return set()
    tasks = content.get("tasks") if isinstance(content, dict) else None
    return {str(task.get("id")) for task in tasks or () if isinstance(task, dict)}
