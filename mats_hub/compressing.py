"""Compressing experts into one repository by masks of a multi-task vector (Wang et al. 2024, https://arxiv.org/abs/2405.07813)."""

from __future__ import annotations

import os
import shutil
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mats_hub.bundle import BUNDLE_FILE, MASK_FILE, VECTOR_STEM, write_bundle_file
from mats_hub.card import write_card
from mats_hub.checkpoint import TORCH_DTYPES, CheckpointWriter, parse_size
from mats_hub.companions import copy_companions
from mats_hub.device import choose_device
from mats_hub.errors import RecipeError
from mats_hub.initialization import Context
from mats_hub.initialization.consensus import multi_task_vector, task_mask
from mats_hub.loading import TASKS_FOLDER, load
from mats_hub.localize import Packer
from mats_hub.merged_model import MergedModel, as_recipe, make_report, write_surroundings
from mats_hub.output import check_output, staged
from mats_hub.plan import Action, Plan
from mats_hub.planning import make_plan
from mats_hub.progress import Progress, silent
from mats_hub.reading import deltas_at
from mats_hub.recipe import RECIPE_FILE, Recipe
from mats_hub.report import TensorRecord
from mats_hub.scoring import LOWER_IS_BETTER
from mats_hub.source import file_sha256, open_source
from mats_hub.suite import VALIDATION, Suite
from mats_hub.thresholds import thresholds

MASK_SCALES = (0.2, 0.3, 0.4, 0.5, 0.6)
"""The paper's grid of λ, of which one is chosen per task on validation data."""

DEFAULT_SCALE = 0.4


def compress(
    experts: Recipe | Sequence[Any] | str | Path,
    *,
    output: str | Path,
    vector: str = "task_arithmetic",
    mask_scale: float | Mapping[str, float] = DEFAULT_SCALE,
    tasks: Suite | Mapping[str, Any] | str | Path | None = None,
    device: str = "auto",
    token: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> MergedModel:
    """Write experts as a base that is named, one multi-task vector and a mask per task, from which each is rebuilt.

    A mask holds one bit for each entry: |τᵢ| > λᵢ |τ − τᵢ|, with τ the sum of the task vectors or the disjoint sum of TIES (top
    20 %). `mats_hub.load(folder, task=…)` gives an expert back.

    Args:
        experts: a recipe or experts, as for `mats_hub.merge`; its own method counts for nothing.
        output: the folder to write, which must not exist or be empty.
        vector: ``task_arithmetic`` or ``ties``.
        mask_scale: λ, one for all tasks or one for each; a smaller one keeps more entries.
        tasks: the experts' tasks; then λ is chosen for each on its validation part, from `MASK_SCALES` (the first of equals).
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        token: Hub token; the one stored on this machine otherwise.
        progress: wraps the iteration over tensors.
        **options: recipe options when `experts` is a list: ``base``, ``dtype`` (of the vector), ``max_shard_size``, …

    Raises:
        RecipeError: an option that cannot be.
        PlanError: what stands in the way.
        OutputError: the output folder holds something or cannot be written.

    """
    if vector not in ("task_arithmetic", "ties"):
        raise RecipeError(f"the multi-task vector is 'task_arithmetic' or 'ties', not {vector!r}")
    target, place = check_output(output), choose_device(device)
    start = as_recipe(experts, **options)
    plan = make_plan(_as_consensus(start, vector), token)
    plan.raise_problems()
    suite = None if tasks is None else tasks if isinstance(tasks, Suite) else _suite(tasks)
    names = [expert.name for expert in plan.experts]
    scales = {name: MASK_SCALES if suite and name in suite else (_scale_of(mask_scale, name),) for name in names}
    assert plan.base is not None
    spec = str(plan.base.source.folder or plan.base.source.public_spec)
    with staged(target) as stage:
        notes = [*plan.notes, *write_surroundings(plan, stage)]
        records, packers = _write_vector_and_masks(plan, stage, vector, scales, place, progress or silent)
        chosen = {name: held[0] for name, held in scales.items()}
        if suite:
            chosen |= _choose(plan, stage, scales, suite, spec, str(place), token)
        _settle(plan, stage, chosen, packers)
        _report(plan, stage, records, notes, place)
    return MergedModel(target, MergedModel.open(target).report, base=spec)


def _suite(tasks: Mapping[str, Any] | str | Path) -> Suite:
    return Suite.load(tasks) if isinstance(tasks, str | Path) else Suite.from_mapping(tasks)


def _as_consensus(recipe: Recipe, vector: str) -> Recipe:
    """Return the recipe with the method whose masks these are, so that card and recipe name it; written as a full checkpoint."""
    method = "consensus_ties" if vector == "ties" else "consensus"
    return recipe.changed(method=method, format="full")


def _scale_of(given: float | Mapping[str, float], name: str) -> float:
    value = given.get(name, DEFAULT_SCALE) if isinstance(given, Mapping) else given
    if not value > 0:
        raise RecipeError(f"mask_scale of {name!r} is {value}; it is larger than 0")
    return float(value)


def _mask_path(folder: Path, task: str, scale: float) -> Path:
    return folder / TASKS_FOLDER / task / f"mask-{scale:g}"


def _write_vector_and_masks(
    plan: Plan,
    folder: Path,
    vector: str,
    scales: Mapping[str, Sequence[float]],
    device: torch.device,
    show: Progress,
) -> tuple[list[TensorRecord], dict[tuple[str, float], Packer]]:
    """Write the vector, and a mask for each task and λ; return the tensors' records and how much each mask keeps."""
    entries = sorted(plan.merged_entries, key=lambda entry: entry.key)
    layout = {entry.key: plan.written[entry.key] for entry in entries}
    density = plan.recipe.initialization.global_density
    cuts = thresholds(plan, [density], device, show)[density] if density is not None else None
    context = Context(experts=tuple(scales), seed=plan.recipe.seed, thresholds=cuts)
    weights = [expert.weight for expert in plan.experts]
    packers = {(name, scale): Packer() for name, held in scales.items() for scale in held}
    limit, records = parse_size(plan.recipe.output.max_shard_size), []
    files = {}
    for name, scale in packers:
        path = _mask_path(folder, name, scale)
        files[name, scale] = path.open("wb")
    try:
        with CheckpointWriter(folder, layout, limit, {}, VECTOR_STEM) as writer:
            for entry in show(entries, len(entries), "vector and masks"):
                origin, deltas = deltas_at(plan, entry, device)
                merged = multi_task_vector(deltas, weights, context, vector, density or 1.0)
                merged = merged.to(TORCH_DTYPES[layout[entry.key].dtype]).to(origin)  # masks are of what is stored
                writer.write(entry.key, merged)
                for delta, (name, held) in zip(deltas, scales.items(), strict=True):
                    for scale in held:
                        mask = task_mask(delta, merged, scale)
                        files[name, scale].write(packers[name, scale].add(mask))
                norms = tuple(float(torch.linalg.vector_norm(delta)) for delta in deltas)
                norm = float(torch.linalg.vector_norm(merged))
                records.append(
                    TensorRecord(
                        entry.key,
                        entry.action,
                        entry.reason,
                        initialization_norm=norm,
                        solution_norm=norm,
                        expert_norms=norms,
                    )
                )
        for key, packer in packers.items():
            files[key].write(packer.end())
    finally:
        for file in files.values():
            file.close()
    return records, packers


def _choose(
    plan: Plan, folder: Path, scales: Mapping[str, Sequence[float]], suite: Suite, base: str, device: str, token: Any
) -> dict[str, float]:
    """Return the λ of the best validation score for each task of the suite; the first of several."""
    chosen = {}
    for task in (name for name in scales if name in suite):
        scores = {}
        for scale in scales[task]:
            with tempfile.TemporaryDirectory(prefix="mats_hub-") as place:
                trial = Path(place) / "bundle"
                shutil.copytree(folder, trial, copy_function=os.link if _same_disk(folder, place) else shutil.copy2)
                _settle(plan, trial, {**{name: held[0] for name, held in scales.items()}, task: scale}, {})
                model = load(trial, task, dtype="float32", base=base)
                scores[scale] = suite.score(task, VALIDATION, model, trial, device, token)
        lower = suite[task].metric in LOWER_IS_BETTER
        chosen[task] = (min if lower else max)(scores, key=scores.__getitem__)
    return chosen


def _same_disk(one: Path, other: str) -> bool:
    return one.stat().st_dev == Path(other).stat().st_dev


def _settle(plan: Plan, folder: Path, chosen: Mapping[str, float], packers: Mapping[tuple[str, float], Packer]) -> None:
    """Keep the masks of the chosen λ, each compressed where that makes it smaller, and write what the bundle is made of."""
    assert plan.base is not None
    tasks = {}
    count = sum(plan.written[entry.key].numel for entry in plan.merged_entries)
    for name, scale in chosen.items():
        raw = _mask_path(folder, name, scale).read_bytes()
        packed = zlib.compress(raw, 9)
        encoding, content = ("zlib", packed) if len(packed) < len(raw) else ("raw", raw)
        path = folder / TASKS_FOLDER / name / MASK_FILE
        path.write_bytes(content)
        for other in path.parent.glob("mask-*"):
            other.unlink()
        packer = packers.get((name, scale))
        kept = packer.kept / max(1, packer.count) if packer else None
        facts = {"mask_scale": scale, "count": count, "encoding": encoding, "bytes": len(content), "kept": kept}
        tasks[name] = {**facts, "sha256": file_sha256(path)}
    source = plan.base.source
    write_bundle_file(
        folder,
        {
            "format": 1,
            "base": {"model": source.public_spec, "fingerprint": source.fingerprint},
            "names": sorted(entry.key for entry in plan.merged_entries),
            "left_out": [entry.key for entry in plan.entries if entry.action is Action.TIED],
            "tasks": tasks,
            "vector": {path.name: file_sha256(path) for path in sorted(folder.glob(f"{VECTOR_STEM}*.safetensors"))},
        },
    )


def _report(plan: Plan, folder: Path, records: list[TensorRecord], notes: list[str], device: torch.device) -> None:
    bundle = open_source(folder).json(BUNDLE_FILE)
    held = [*(path for path in folder.rglob("*.safetensors")), *folder.rglob(MASK_FILE)]
    files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(held)}
    sources = [expert.source for expert in plan.experts]
    facts = {
        "tasks": {
            name: {key: task[key] for key in ("mask_scale", "bytes", "kept")} for name, task in bundle["tasks"].items()
        },
        "bytes": sum(path.stat().st_size for path in held),
        "expert_bytes": sum(source.sizes[name] for source in sources for name in source.weight_files),
        "full_bytes": len(sources) * sum(header.nbytes for header in plan.written.values()),
    }
    recipe_text = plan.recipe.to_yaml()
    (folder / RECIPE_FILE).write_text(recipe_text, encoding="utf-8")
    report = make_report(plan, records, device, files, notes)
    report.bundle = facts
    report.write(folder)
    write_card(report, folder)


def extract(
    model: str | Path, task: str, *, output: str | Path, base: str | Path | None = None, token: str | None = None
) -> Path:
    """Write one of several compressed experts as an ordinary checkpoint with its tokenizer; return the folder.

    Raises:
        SourceError: there is no such bundle or task.
        OutputError: the output folder holds something.

    """
    target = check_output(output)
    source = open_source(model, token)
    with staged(target) as stage:
        load(model, task, token=token, base=base).save_pretrained(stage)
        copy_companions([source], [source], stage)
    return target
