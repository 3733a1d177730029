"""Merges on the Hub: which there are, what they were made of, and what those were made of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mats_hub.card import CARD_FILE, MERGE_TAG
from mats_hub.errors import HubError, MatsError, SourceError
from mats_hub.hub_client import hub_api, hub_errors
from mats_hub.hub_id import is_hub_id
from mats_hub.recipe import RECIPE_FILE, Recipe
from mats_hub.report import REPORT_FILE, MergeReport
from mats_hub.source import open_source

MAX_DEPTH = 8
"""Generations that a lineage is followed for."""


@dataclass(frozen=True)
class FoundMerge:
    """A merge on the Hub, as its card's metadata tell.

    Attributes:
        repo_id: its id.
        method: the named method.
        base: the base's id, when it is on the Hub.
        experts: the ids of the merged models that are on the Hub.
        results: rows of task, data set, metric and value.
        likes: how many like it.
        downloads: in the last 30 days.
        modified: of its last commit.

    """

    repo_id: str
    method: str
    base: str | None
    experts: tuple[str, ...]
    results: tuple[dict[str, Any], ...]
    likes: int = 0
    downloads: int = 0
    modified: datetime | None = None

    @property
    def mean(self) -> float | None:
        """The mean of the results; None where there is none."""
        values = [row["value"] for row in self.results]
        return sum(values) / len(values) if values else None


def browse(
    query: str | None = None,
    *,
    author: str | None = None,
    base: str | None = None,
    limit: int = 20,
    token: str | bool | None = None,
) -> list[FoundMerge]:
    """Return merges on the Hub that carry a recipe of this package, the last changed first.

    Args:
        query: words in the id.
        author: user or organization.
        base: id of a model that they are made from: the base, or one of the experts.
        limit: at most so many.
        token: Hub token; the one stored on this machine otherwise.

    Raises:
        HubError: the Hub cannot be reached.

    """
    found: list[FoundMerge] = []
    with hub_errors("the Hub's models", HubError):
        listed = hub_api(token).list_models(
            filter=MERGE_TAG, search=query, author=author, sort="last_modified", cardData=True
        )
        for info in listed:
            merge = _found(info)
            if merge is not None and (base is None or base in (merge.base, *merge.experts)):
                found.append(merge)
            if len(found) >= limit:
                break
    return found


def _found(info: Any) -> FoundMerge | None:
    """Return what a listed model's card tells; None where it only names the tag."""
    content = info.card_data.to_dict() if info.card_data else {}
    block = content.get(MERGE_TAG)
    if not isinstance(block, dict) or not isinstance(block.get("method"), str):
        return None
    parents = content.get("base_model") or ()
    parents = [parents] if isinstance(parents, str) else parents
    experts = block.get("experts")
    experts = experts if isinstance(experts, list) else parents
    base = block.get("base") if isinstance(block.get("base"), str) else None
    names = tuple(name for name in experts if isinstance(name, str))
    rows = tuple(_results(content.get("model-index")))
    return FoundMerge(
        info.id, block["method"], base, names, rows, info.likes or 0, info.downloads or 0, info.last_modified
    )


def _results(index: Any) -> Iterator[dict[str, Any]]:
    """Go through the scores of a card's ``model-index``, leaving out what is malformed: anybody may have written it."""
    for model in index if isinstance(index, list) else ():
        for result in (model.get("results") or ()) if isinstance(model, dict) else ():
            try:
                dataset, metrics = result["dataset"].get("name", ""), result["metrics"]
                for metric in metrics:
                    task = str(result["task"].get("name") or result["task"].get("type"))
                    yield {
                        "task": task,
                        "dataset": str(dataset),
                        "metric": str(metric["type"]),
                        "value": float(metric["value"]),
                    }
            except (KeyError, TypeError, ValueError, AttributeError):
                continue


@dataclass
class Lineage:
    """A model and what it was made from.

    Attributes:
        spec: ``owner/name@commit`` where the commit is known, or a folder's last part.
        role: merged model, expert or base; '' of the model that was asked for.
        method: how it was merged; '' where it was not, by this package.
        parents: what it was made from.
        note: why its parents are not known.

    """

    spec: str
    role: str = ""
    method: str = ""
    parents: list[Lineage] = field(default_factory=list)
    note: str = ""

    def __str__(self) -> str:
        return "\n".join(self._lines("", ""))

    def _lines(self, first: str, rest: str) -> Iterator[str]:
        about = ", ".join(part for part in (self.role, self.method and f"merged with {self.method}", self.note) if part)
        yield f"{first}{self.spec}" + (f" ({about})" if about else "")
        for number, parent in enumerate(self.parents, start=1):
            last = number == len(self.parents)
            yield from parent._lines(rest + ("└── " if last else "├── "), rest + ("    " if last else "│   "))


def lineage(model: str, token: str | bool | None = None) -> Lineage:
    """Return what a model was made from: of a merge its experts and base at their commits, and theirs in turn.

    Of other models the card's ``base_model`` is followed.

    Args:
        model: a Hub id ``owner/name[/folder][@revision]`` or a folder.
        token: Hub token; the one stored on this machine otherwise.

    Raises:
        SourceError: the model cannot be found.

    """
    return _lineage(str(model), "", token, frozenset(), must=True)


def _lineage(spec: str, role: str, token: Any, above: frozenset[str], must: bool = False) -> Lineage:
    name = spec.partition("@")[0]
    if not must and not (is_hub_id(name) and "/" in name):
        return Lineage(spec, role, note="a folder on the machine of whoever merged it")
    if name in above or len(above) >= MAX_DEPTH:
        return Lineage(spec, role, note="shown above" if name in above else "not followed further")
    try:
        source = open_source(spec, token)
        report = MergeReport.from_mapping(source.json(REPORT_FILE)) if REPORT_FILE in source.sizes else None
        matter = source.front_matter
    except MatsError:
        if must:
            raise
        return Lineage(spec, role, note="not on the Hub any more, or not for this machine's token")
    found, above = Lineage(source.public_spec, role), above | {name}
    if report is None:
        parents = matter.get("base_model") or ()
        for parent in [parents] if isinstance(parents, str) else parents:
            if isinstance(parent, str):
                found.parents.append(_lineage(parent, "base", token, above))
        return found
    found.method = str(report.recipe["method"])
    children = [(expert["model"], "expert") for expert in report.experts]
    children += [(report.base["model"], "base")] if report.base else []
    found.parents = [_lineage(child, of, token, above) for child, of in children]
    return found


def read_recipe(model: str, token: str | bool | None = None) -> Recipe:
    """Return the recipe that a merge carries.

    Raises:
        SourceError: the model cannot be found, or is no merge of this package.
        RecipeError: its recipe cannot be read.

    """
    source = open_source(model, token)
    if RECIPE_FILE not in source.sizes:
        raise SourceError(f"{source.spec!r} is no merge of this package: it has no {RECIPE_FILE}")
    return Recipe.load(source.path(RECIPE_FILE))


def read_card(model: str, token: str | bool | None = None) -> str:
    """Return the text of a model's card.

    Raises:
        SourceError: the model cannot be found, or has no card.

    """
    source = open_source(model, token)
    if CARD_FILE not in source.sizes:
        raise SourceError(f"{source.spec!r} has no card ({CARD_FILE})")
    return source.path(CARD_FILE).read_text(encoding="utf-8", errors="replace")
