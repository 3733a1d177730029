"""A task's data set: where it is read from, and which of its columns plays which role."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mats_hub.errors import SourceError, StatisticsError, unknown
from mats_hub.hub_client import hub_api, hub_errors
from mats_hub.hub_id import HUB_ID, from_address

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "question"),
    ("article", "question"),
    ("sent1", "sent2"),
    ("question", "context"),
    ("instruction", "input"),
)
COLUMN_NAMES = {
    "text": (
        *("text", "sentence", "content", "prompt", "instruction", "question", "query", "problem", "input", "source"),
        *("question_stem", "goal", "ctx", "inputs_pretokenized"),
    ),
    "words": ("tokens", "words"),
    "label": ("label", "labels"),
    "tags": ("ner_tags", "tags", "pos_tags", "chunk_tags", "labels"),
    "answers": ("answers",),
    "choices": ("choices", "options", "endings", "answer_choices"),
    "right choice": (
        *("label", "labels", "answer", "answerKey", "answer_index", "answer_idx", "correct", "correct_option", "cop"),
        *("target", "targets_pretokenized"),
    ),
    "image": ("image", "img", "images"),
    "target": (
        *("target", "completion", "response", "output", "summary", "answer", "solution"),
        *("sentence", "transcription", "targets_pretokenized"),
    ),
    "audio": ("audio", "speech"),
    "messages": ("messages", "conversations"),
}
"""Column names that are taken for a role without being asked; a data set's only column of the right kind is too."""

NUMBERED = re.compile(r"((?:choice|option|solution|sol|ending|answer|op)_?|)([0-9A-Za-z])")
"""Columns that hold one choice each: choice1 and choice2, ending0 to ending3, A to D."""

PLAYED_BY = {"words": "text", "tags": "label", "answers": "label", "right choice": "label"}
"""Roles that have names of their own, and by which name they are given."""

SEVERAL = ("text", "choices")
"""Roles that several columns may play together."""


def listed(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of columns, of which one may be given alone."""
    return (names,) if isinstance(names, str) else tuple(names)


@dataclass(frozen=True)
class Columns:
    """Which column of a data set plays which role; empty ones are inferred."""

    text: tuple[str, ...] = ()
    label: str | None = None
    image: str | None = None
    target: str | None = None
    messages: str | None = None
    audio: str | None = None
    choices: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the roles that are taken."""
        return {role: value for role, value in vars(self).items() if value}

    @property
    def names(self) -> list[str]:
        """The columns, whatever role they play."""
        return [name for value in vars(self).values() if value for name in listed(value)]


def with_fields(dataset: Any, given: Columns) -> Any:
    """Return the data set with a column for each field of its others, as ``translation.de``, where such a one is given."""
    inside = any("." in name and name not in dataset.column_names for name in given.names)
    return dataset.flatten() if inside else dataset


def infer_columns(dataset: Any, given: Columns, roles: Sequence[str], needs_labels: bool = True) -> Columns:
    """Return the columns to read, those that were not given being inferred from their names.

    Raises:
        StatisticsError: a given column is not there, or one cannot be inferred.

    """
    present = list(dataset.column_names)
    for column in given.names:
        if column not in present:
            raise StatisticsError(unknown("column", column, present))
    chosen: dict[str, Any] = {}
    for kind in roles:
        role = PLAYED_BY.get(kind, kind)
        value = getattr(given, role) or infer_role(kind, present)
        if not value and (needs_labels or role != "label"):
            raise StatisticsError(
                f"cannot tell which column is the {kind}; name it with --{role}. The data set has: "
                f"{', '.join(dataset.flatten().column_names)}"
            )
        if value:
            chosen[role] = value
    return Columns(**chosen)


def infer_role(role: str, present: Sequence[str]) -> Any:
    """Return the column that plays a role, told by its name, a tuple where several may; None where no name tells."""
    if role == "text" and "text" not in present:
        for pair in TEXT_PAIRS:
            if set(pair) <= set(present):
                return pair
    named = [name for name in COLUMN_NAMES[role] if name in present]
    if role == "choices" and not named:
        return _numbered(present)
    several = PLAYED_BY.get(role, role) in SEVERAL
    return (named[0],) if named and several else (named[0] if named else None)


def _numbered(present: Sequence[str]) -> tuple[str, ...] | None:
    """Return columns whose names differ in their number or letter alone, from the first one (0, 1, a, A) on."""
    families: dict[str, list[str]] = {}
    for name in sorted(present):
        if found := NUMBERED.fullmatch(name):
            families.setdefault(found[1], []).append(found[2])
    for stem, ends in families.items():
        codes = [ord(end) for end in ends]
        if len(ends) > 1 and ends[0] in "01aA" and codes == list(range(codes[0], codes[0] + len(codes))):
            return tuple(stem + end for end in ends)
    return None


def load_dataset(
    name: Any, config: str | None = None, split: str | None = None, token: Any = None
) -> tuple[Any, str, str | None]:
    """Open a data set.

    Args:
        name: a `datasets.Dataset` or a list of examples; a JSONL, CSV or Parquet file; a folder of such files, of images by
            class, or that ``save_to_disk`` made; or a Hub id ``owner/name[@revision]``.
        config: its configuration.
        split: its split, where it has several; ``validation`` otherwise.
        token: Hub token.

    Returns:
        The data set, its public name (an id, or a file's name) and its commit when it has one.

    Raises:
        SourceError: it cannot be found or read.

    """
    import datasets

    if isinstance(name, list):
        name = datasets.Dataset.from_list(name)
    if isinstance(name, datasets.DatasetDict):
        name = _part(name, split)
    if isinstance(name, datasets.Dataset):
        return name, str(name.info.dataset_name or "an in-memory data set"), None
    if isinstance(name, datasets.IterableDataset):
        raise SourceError(
            "a data set that is streamed has no end that is known; take some of it: list(streamed.take(400))"
        )
    name = from_address(str(name))
    path = Path(name).expanduser()
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        with _no_progress_bars():
            if path.is_file():
                if path.suffix not in formats:
                    raise SourceError(
                        f"{path.name!r}: data files are {', '.join(formats)}, or a data set's id on the Hub"
                    )
                loaded = datasets.load_dataset(formats[path.suffix], data_files=str(path), split="train")
                return loaded, path.name, None
            if path.is_dir():
                saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
                loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path), config)
                return _part(loaded, split), path.resolve().name, None
            repo_id, _, revision = name.partition("@")
            if not HUB_ID.match(repo_id):
                raise SourceError(
                    f"{name!r} is no file or folder on this machine, and no Hub id like 'owner/name' or "
                    "'owner/name@revision'"
                )
            with hub_errors(name):
                commit = hub_api(token).dataset_info(repo_id, revision=revision or None).sha
                loaded = datasets.load_dataset(
                    repo_id, config, split=split or "validation", revision=commit, token=token
                )
            return loaded, repo_id, commit
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as error:
        text = str(error.__cause__ or error).strip().splitlines()
        raise SourceError(f"data set {name!r} cannot be read: {text[0] if text else type(error).__name__}") from error


def _part(loaded: Any, split: str | None) -> Any:
    """Return one split of several, or the only one there is."""
    if not hasattr(loaded, "keys"):
        return loaded
    wanted = split or ("validation" if len(loaded) > 1 else next(iter(loaded)))
    if wanted not in loaded:
        raise SourceError(unknown("split", wanted, loaded))
    return loaded[wanted]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets

    shown = datasets.utils.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
