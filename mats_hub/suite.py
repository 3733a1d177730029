"""A file of tasks: on which data models are scored, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mats_hub.errors import RecipeError
from mats_hub.initialization_options import Part
from mats_hub.schema_errors import explain

VALIDATION, TEST = "validation", "test"


class TaskEntry(Part):
    """One task of the file: its data, and how a model is scored on them."""

    dataset: str | None = Field(None, description="Hub id 'owner/name[@revision]', or a folder; not needed for files")
    config: str | None = Field(None, description="the data set's configuration")
    validation: str = Field(VALIDATION, description="split that settings are chosen on; a file without 'dataset'")
    test: str = Field(TEST, description="split that results are of; a file without 'dataset'")
    text: tuple[str, ...] | str = Field((), description="text column, or two of them")
    label: str | None = None
    image: str | None = None
    target: str | None = None
    messages: str | None = None
    audio: str | None = None
    choices: tuple[str, ...] | str = Field((), description="column of answers to choose from, or one for each")
    metric: Literal["accuracy", "f1", "loss", "perplexity"] = "accuracy"
    examples: int | None = Field(None, ge=1, description="at most so many, drawn by 'seed'; all otherwise")
    seed: int = Field(0, ge=0)
    max_length: int | None = Field(None, ge=1, description="tokens after which a text is cut")
    batch_size: int = Field(64, ge=1)
    task_id: str | None = Field(None, description="of a registered benchmark")

    @model_validator(mode="after")
    def _files_have_endings(self) -> TaskEntry:
        if self.dataset is None and not all("." in name for name in (self.validation, self.test)):
            raise ValueError("without 'dataset', 'validation' and 'test' are files (.jsonl, .csv, .parquet)")
        return self


class Suite(Mapping[str, TaskEntry]):
    """Tasks by name, in the order of the file.

    Args:
        tasks: name → entry.
        folder: what files' names are relative to.

    """

    def __init__(self, tasks: Mapping[str, TaskEntry], folder: Path | None = None) -> None:
        self._tasks, self._folder = dict(tasks), folder or Path()
        self._opened: dict[tuple[str, str], Any] = {}

    def __getitem__(self, name: str) -> TaskEntry:
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    @classmethod
    def load(cls, path: str | Path) -> Suite:
        """Read a YAML file, a mapping of tasks' names to their entries.

        Raises:
            RecipeError: it is not there, is not YAML, or has an entry that cannot be.

        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise RecipeError(f"cannot read the tasks {str(path)!r}: {' '.join(str(error).split())}") from None
        return cls.from_mapping(content, Path(path).parent, str(path))

    @classmethod
    def from_mapping(cls, content: Any, folder: Path | None = None, label: str = "tasks") -> Suite:
        """Return the tasks in a mapping.

        Raises:
            RecipeError: an entry cannot be.

        """
        if not isinstance(content, Mapping) or not content:
            raise RecipeError(
                f"{label} holds no tasks; write a mapping of names to data: 'mrpc: {{dataset: nyu-mll/glue, …}}'"
            )
        tasks = {}
        for name, entry in content.items():
            try:
                tasks[str(name)] = TaskEntry.model_validate(entry)
            except ValidationError as error:
                raise RecipeError(f"{label}: {name}: {explain(error, lambda place: TaskEntry)}") from None
        return cls(tasks, folder)

    def hub_id(self, name: str) -> str | None:
        """Return the id of the data set that a task is of; None where that is a folder or file."""
        place = self[name].dataset
        return None if place is None or (self._folder / place).exists() else place

    def data(self, name: str, which: str, token: str | bool | None = None) -> Any:
        """Return the examples of a task's ``validation`` or ``test`` part (`datasets.Dataset`); the other is not opened.

        Raises:
            SourceError: they cannot be found or read.

        """
        from mats_hub.statistics.dataset import load_dataset

        if (name, which) not in self._opened:
            entry, part = self[name], getattr(self[name], which)
            place = self.hub_id(name) or str(self._folder / (entry.dataset or part))
            loaded, _, _ = load_dataset(place, entry.config, part if entry.dataset else None, token)
            if entry.examples and entry.examples < len(loaded):
                loaded = loaded.shuffle(seed=entry.seed).select(range(entry.examples))
            self._opened[name, which] = loaded
        return self._opened[name, which]

    def score(
        self,
        name: str,
        which: str,
        model: Any,
        processor: Any,
        device: str = "auto",
        token: Any = None,
        base: str | Path | None = None,
    ) -> float:
        """Return a loaded model's score on one of the tasks.

        Args:
            name: the task.
            which: ``validation`` or ``test``.
            model: a transformers model.
            processor: folder or id its tokenizer, or processor of images or sounds, comes from.
            device: where to compute.
            token: Hub token.
            base: where they come from if not from there.

        """
        from mats_hub.evaluation import evaluate
        from mats_hub.statistics.dataset import Columns

        entry = self[name]
        roles = (*vars(Columns()), "metric", "batch_size", "max_length")
        options: dict[str, Any] = {role: getattr(entry, role) for role in roles}
        data = self.data(name, which, token)
        return evaluate(model, dataset=data, processor=processor, base=base, device=device, token=token, **options)
