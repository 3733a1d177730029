"""Making a published merge again from its recipe: to check it, or to make a variant of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mats_hub.card import write_card
from mats_hub.errors import CheckpointError, SourceError
from mats_hub.merged_model import MergedModel, merge
from mats_hub.output import check_output
from mats_hub.progress import Progress
from mats_hub.recipe import RECIPE_FILE, Recipe
from mats_hub.report import REPORT_FILE, MergeReport
from mats_hub.source import Source, open_source


@dataclass(frozen=True)
class Replay:
    """A merge made again.

    Attributes:
        merged: the new one.
        parent: the published one, ``owner/name@commit`` or a folder's last part.
        files: weight file → whether it has the same sha256, for all files of either.
        differences: tensor → the largest absolute difference; infinite where one has it only, or in another shape or dtype.
            Empty where all files are the same.
        environment: what differs of versions and device: name → theirs and ours.

    """

    merged: MergedModel
    parent: str
    files: dict[str, bool]
    differences: dict[str, float]
    environment: dict[str, tuple[str, str]]

    @property
    def identical(self) -> bool:
        """Whether every tensor is the same, to the last bit."""
        return all(self.files.values()) or not any(self.differences.values())

    def __str__(self) -> str:
        same = sum(self.files.values())
        lines = [f"{self.parent}: {same} of {len(self.files)} weight files have the same sha256"]
        if self.identical and same < len(self.files):
            lines.append("every tensor is the same to the last bit; the files differ in their metadata")
        worst = sorted(((d, key) for key, d in self.differences.items() if d), reverse=True)
        lines += [f"  {key}: differs by up to {difference:.3g}" for difference, key in worst[:10]]
        lines += [f"  … and {len(worst) - 10} more tensors"] if len(worst) > 10 else []
        lines += [f"{name}: {theirs} there, {ours} here" for name, (theirs, ours) in self.environment.items()]
        return "\n".join(lines)


def replay(
    model: str | Path,
    *,
    output: str | Path | None = None,
    changes: Mapping[str, Any] | None = None,
    device: str = "auto",
    stream: bool = False,
    token: str | bool | None = None,
    progress: Progress | None = None,
) -> Replay:
    """Merge again what a repository's recipe says, from the same commits, and compare.

    On the same class of device and with the same versions the weights are the same to the last byte.

    Args:
        model: the merge: a Hub id ``owner/name[/folder][@revision]`` or a folder.
        output: the folder to write; a temporary one otherwise.
        changes: options that differ (as of `Recipe.build`), for a variant; its card names the merge it is a variant of.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        stream: whether weights that are not on this machine are read from the Hub tensor by tensor, and never stored.
        token: Hub token; the one stored on this machine otherwise.
        progress: wraps the iteration over tensors to show it.

    Raises:
        SourceError: there is no such merge, or it was made from folders that are not here.
        RecipeError: a change that cannot be.
        PlanError: what stands in the way of the merge.
        OutputError: the output folder holds something.

    """
    if output is not None:
        check_output(output)
    source = open_source(model, token)
    if RECIPE_FILE not in source.sizes or REPORT_FILE not in source.sizes:
        raise SourceError(f"{source.spec!r} is no merge of this package: it has no {RECIPE_FILE} and {REPORT_FILE}")
    recipe = Recipe.load(source.path(RECIPE_FILE))
    report = MergeReport.from_mapping(source.json(REPORT_FILE))
    for entry in recipe.experts:
        if entry.sha256 and not Path(entry.model).is_dir():
            raise SourceError(
                f"{source.spec!r} was merged from folders, of which {entry.model!r} is not here; run it where they are, or "
                "publish the experts and merge those"
            )
    if report.bundle:
        raise SourceError(
            f"{source.spec!r} holds compressed experts; make it again with 'mats-hub compress' and its recipe"
        )
    recipe = recipe.changed(**changes) if changes else recipe
    merged = merge(recipe, output=output, device=device, stream=stream, token=token, progress=progress)
    if changes:
        said = ", ".join(f"{name} {value}" for name, value in changes.items())
        merged.report.notes.append(f"a variant of {source.public_spec} with {said}")
        merged.report.parent = source.public_spec
        merged.report.write(merged.folder)
        write_card(merged.report, merged.folder)
    ours = merged.report.files
    files = {name: report.files.get(name) == ours.get(name) for name in sorted({*report.files, *ours})}
    differences = {} if all(files.values()) else _differences(source, list(report.files), merged.folder, list(ours))
    keys = sorted({*report.environment, *merged.report.environment})
    both = {key: (report.environment.get(key, "–"), merged.report.environment.get(key, "–")) for key in keys}
    changed = {key: values for key, values in both.items() if values[0] != values[1]}
    return Replay(merged, source.public_spec, files, differences, changed)


def _differences(source: Source, theirs: list[str], folder: Path, ours: list[str]) -> dict[str, float]:
    """Return the largest absolute difference of every tensor in the files of two folders."""
    there = _tensors([source.path(name) for name in theirs])
    here = _tensors([folder / name for name in ours])
    found = {}
    for key in sorted({*there, *here}):
        a, b = (side[key]() if key in side else None for side in (there, here))
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            found[key] = float("inf")
        else:
            found[key] = float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    return found


def _tensors(paths: list[Path]) -> dict[str, Any]:
    """Return tensor → a function that reads it."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
            found.update({key: (lambda key=key, file=file: file.get_tensor(key)) for key in file.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path.name!r} cannot be read: {error}") from None
    return found
