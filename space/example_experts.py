"""The example's experts, trained here once; and ids, of which only theirs and the Hub's are taken."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mats_hub
from mats_hub import MergedModel, Recipe, demo

REPOSITORY = r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}"
HUB_ID = re.compile(rf"{REPOSITORY}(/\w[\w.=+-]*){{0,8}}(@[\w./-]{{1,100}})?")
EXAMPLE = "example/"
"""What the ids of the example's experts begin with; they are trained here, not fetched."""


class Example:
    """The experts of the example: trained here once, so that the page works without a network."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self.data: dict[str, dict[str, Any]] = {}

    @property
    def ids(self) -> list[str]:
        """The experts' ids."""
        return [f"{EXAMPLE}{name}" for name in demo.TASKS]

    def prepare(self, progress: Callable[..., Iterable[Any]]) -> None:
        """Train the base and the experts, unless that is done."""
        with self._lock:
            if self._folder is None:
                folder = Path(tempfile.mkdtemp(prefix="mats-example-"))
                try:
                    self.data = demo.make_experts(folder, "auto", progress)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                self._folder = folder
                atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def path(self, name: str) -> str:
        """Return where an expert of the example is."""
        assert self._folder is not None
        task = name.removeprefix(EXAMPLE)
        return str(self._folder / ("base" if task == "base" else f"experts/{task}"))

    def evaluate(self, merged: MergedModel, progress: Callable[..., Iterable[Any]]) -> None:
        """Score the experts, their average and the merged model on the example's test data."""
        processor = self.path(f"{EXAMPLE}base")
        average = mats_hub.merge([self.path(name) for name in self.ids], base=processor, method="average")
        models = {
            "expert": lambda task: mats_hub.load(self.path(f"{EXAMPLE}{task}")),
            "average": average.load,
            "merged": merged.load,
        }
        pairs = [(task, name) for name in models for task in demo.TASKS]
        merged.add_results(
            [
                {
                    "task": task,
                    "metric": "accuracy",
                    "model": name,
                    "dataset": f"digits, {task}",
                    "value": mats_hub.evaluate(
                        models[name](task), dataset=self.data[task]["test"], processor=processor
                    ),
                }
                for task, name in progress(pairs, len(pairs), "measuring on test data")
            ]
        )


def check_ids(recipe: Recipe, example: Example) -> Recipe:
    """Return the recipe with the example's ids replaced by where it is, after refusing whatever is no Hub id.

    Raises:
        ValueError: something in it is a path, a URL, or no id at all.

    """

    def checked(name: str | None, what: str) -> str | None:
        if name is None:
            return None
        if name in (*example.ids, f"{EXAMPLE}base"):
            return example.path(name)
        if not HUB_ID.fullmatch(name) or ".." in name or Path(name).exists():
            raise ValueError(f"{what} {name[:80]!r} is no Hub id; write owner/name or owner/name@revision")
        return name

    experts = [
        entry.model_copy(
            update={
                "model": checked(entry.model, "the expert"),
                "name": entry.task,
                "statistics": checked(entry.statistics, "the statistics"),
            }
        )
        for entry in recipe.experts
    ]
    changes = {"experts": tuple(experts), "base": checked(recipe.base, "the base")}
    return recipe.model_copy(update={**changes, "tokenizer": checked(recipe.tokenizer, "the tokenizer")})
