"""The merged model: a folder that is an ordinary Hub repository, made in one piece from a recipe."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mats_hub import __version__
from mats_hub.adapter import FoldedAdapter
from mats_hub.card import write_card
from mats_hub.checkpoint import CheckpointWriter
from mats_hub.companions import copy_companions
from mats_hub.errors import RecipeError, SourceError
from mats_hub.expert import Expert
from mats_hub.journal import Journal, digest_of
from mats_hub.loading import CONFIG_FILE, TASKS_FOLDER, concrete_class, fold, load
from mats_hub.output import check_output, resumable, staged
from mats_hub.plan import Plan, human_bytes
from mats_hub.planning import make_plan
from mats_hub.processes import agreed, is_first, join, local_device, wait
from mats_hub.progress import Progress
from mats_hub.recipe import RECIPE_FILE, Recipe
from mats_hub.report import REPORT_FILE, MergeReport, TensorRecord, Watch
from mats_hub.source import Source, file_sha256, open_source


class MergedModel:
    """A merged model in a folder.

    Attributes:
        folder: where it is.
        report: what the merge did.
        base: the base it was just merged on, for a merged adapter to be loaded onto; None after it was opened again.

    """

    def __init__(
        self, folder: Path, report: MergeReport, temporary: bool = False, base: str | Path | None = None
    ) -> None:
        self.folder, self.report, self.base = folder, report, base
        if temporary:
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    @classmethod
    def open(cls, model: str | Path, token: str | bool | None = None) -> MergedModel:
        """Open a merged model in a folder.

        Raises:
            SourceError: there is no merged model.

        """
        source = open_source(model, token)
        if REPORT_FILE not in source.sizes or source.folder is None:
            raise SourceError(
                f"{source.spec!r} is no folder with a merged model of this package: it has no {REPORT_FILE}"
            )
        return cls(source.folder, MergeReport.from_mapping(source.json(REPORT_FILE)))

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> MergedModel:
        """Open a merged model in a folder, or one on the Hub, which is fetched into the Hub's cache.

        Args:
            model: a folder, or ``owner/name[/folder][@revision]``.
            revision: the branch, tag or commit.
            token: Hub token; the one stored on this machine otherwise.

        Raises:
            SourceError: there is no merged model.

        """
        source = open_source(f"{model}@{revision}" if revision else model, token)
        if source.folder is None:
            for name in source.sizes:
                source.path(name)
        return cls.open(source.folder or source.path(REPORT_FILE).parent)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Copy the merged model to a folder; see `save`."""
        return self.save(folder)

    def load(
        self, task: str | None = None, dtype: str = "auto", device: str = "cpu", base: str | Path | None = None
    ) -> Any:
        """Return the model as a transformers object; see `mats_hub.load`."""
        return load(self.folder, task, dtype, device, base=base or self.base)

    def save(self, folder: str | Path) -> Path:
        """Copy the merged model to a folder that does not exist or is empty; it appears complete or not at all.

        Raises:
            OutputError: the folder holds something, or cannot be written.

        """
        target = check_output(folder)
        with staged(target) as stage:
            shutil.copytree(self.folder, stage, dirs_exist_ok=True)
        return target

    def add_results(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Add rows of scores to the report (see `MergeReport.results`), and write the card anew."""
        self.report.results.extend(dict(row) for row in results)
        self.report.write(self.folder)
        write_card(self.report, self.folder)

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | bool | None = None, **options: Any
    ) -> str:
        """Publish the folder in one commit; see `mats_hub.hub.push`. Returns the commit's URL."""
        from mats_hub.hub import push

        return push(self.folder, repo_id, private=private, token=token, **options)


def merge(
    experts: Recipe | Sequence[str | Mapping[str, Any]] | str | Path,
    *,
    output: str | Path | None = None,
    device: str = "auto",
    token: str | bool | None = None,
    stream: bool = False,
    progress: Progress | None = None,
    watch: Watch | None = None,
    on_file: Callable[[Path], None] | None = None,
    **options: Any,
) -> MergedModel:
    """Merge experts into one model.

    What an interrupted merge into an output folder has finished is kept beside it, in ``.NAME.partial``; the same merge goes
    on from there. Under ``torchrun`` the tensors are shared out among the processes.

    Args:
        experts: a `Recipe`, the path of a recipe file, or the experts: Hub ids, folders, or mappings with the fields of
            an expert (model, name, weight, statistics).
        output: the folder to write, which must not exist or be empty; otherwise a temporary one that lasts as long as the
            returned object (`save` keeps it).
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        token: Hub token; the one stored on this machine otherwise.
        stream: whether weights that are not on this machine are read from the Hub tensor by tensor, and never stored.
        progress: wraps the iteration over tensors (iterable, total, description) to show it.
        watch: called with the `TensorRecord` of every tensor as soon as it is merged.
        on_file: called with the path of every weight file as soon as it is complete, to send it somewhere.
        **options: recipe options when `experts` is a list: ``base``, ``method``, ``scale``, ``iterations``, …

    Returns:
        The merged model in its folder, with card, recipe and report.

    Raises:
        RecipeError: an option is unknown or has a value it cannot have.
        PlanError: everything that stands in the way, before any weight is read.
        NumericalError: a non-finite value in a model or in the result.
        OutputError: the output folder holds something or cannot be written.

    """
    from mats_hub.device import choose_device, memory_errors

    recipe = as_recipe(experts, **options)
    join()
    target = check_output(output) if output is not None else None
    place = choose_device(local_device(device))
    plan = make_plan(recipe, token, stream)
    if not plan.problems:
        plan.problems += plan.shortages(target if target is not None else Path(tempfile.gettempdir()))
    plan.raise_problems()
    base = plan.base.source.folder or plan.base.source.public_spec if plan.base else None
    run = partial(_write_all, plan, device=place, progress=progress, watch=watch, on_file=on_file)
    room = memory_errors(
        f"merging; about {human_bytes(plan.peak_memory_bytes)} are needed",
        "Stop what else takes memory, merge on another device (--device cpu), or take statistics with fewer entries (mats-hub "
        "statistics --rank)",
    )
    if target is not None:
        with resumable(target) as stage, room:
            report = run(stage)
        return MergedModel(target, report, base=base)
    folder = Path(agreed(tempfile.mkdtemp(prefix="mats_hub-") if is_first() else ""))
    try:
        with room:
            report = run(folder)
        return MergedModel(folder, report, temporary=is_first(), base=base)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def as_recipe(experts: Recipe | Sequence[str | Mapping[str, Any]] | str | Path, **options: Any) -> Recipe:
    """Return the recipe that the arguments of `merge` describe.

    Raises:
        RecipeError: options beside a finished recipe, or an option that cannot be.

    """
    if isinstance(experts, str | Path):
        experts = Recipe.load(experts)
    if isinstance(experts, Recipe):
        if options:
            raise RecipeError(f"options beside a finished recipe: {', '.join(options)}; write them into the recipe")
        return experts
    return Recipe.build(experts, **options)


def _write_all(
    plan: Plan,
    folder: Path,
    device: Any,
    progress: Progress | None,
    watch: Watch | None,
    on_file: Callable[[Path], None] | None,
) -> MergeReport:
    """Write weights, heads, configs, companions, recipe, report and card; return the report, in every process."""
    from mats_hub.adapter_merging import merge_adapters
    from mats_hub.merging import merge_tensors
    from mats_hub.reading import compute_dtype

    recipe_text = plan.recipe.to_yaml()
    digest = hashlib.sha256(recipe_text.encode()).hexdigest()
    as_adapter = plan.recipe.output.format == "adapter"
    write = merge_adapters if as_adapter else merge_tensors
    dtype = str(compute_dtype(plan, device)).removeprefix("torch.")
    journal = Journal(folder, digest_of([digest, __version__, device.type, dtype, plan.identity]), on_file)
    if is_first():
        journal.clear()
    wait()
    with tempfile.TemporaryDirectory(prefix="mats_hub-") as spool:
        for expert in plan.experts:
            if isinstance(expert.adapter, FoldedAdapter):
                assert plan.base is not None
                fold(expert, plan.base.source, Path(spool), "float64" if plan.is_double else "float32")
        # An adapter is small: every process makes it, and the first one's is kept.
        place = folder if is_first() or not as_adapter else Path(spool)
        records = write(plan, place, device, {"mats_recipe_sha256": digest}, progress, watch, journal)
    if not is_first():
        return agreed(None)
    notes = [*plan.notes, *write_surroundings(plan, folder)]
    plan.finish_reading()
    (folder / RECIPE_FILE).write_text(recipe_text, encoding="utf-8")
    files = {path.name: journal.files.get(path.name) or file_sha256(path) for path in _weights(folder)}
    report = make_report(plan, records, device, files, notes)
    report.write(folder)
    write_card(report, folder)
    journal.remove()
    return agreed(report)


def make_report(
    plan: Plan, records: list[TensorRecord], device: Any, files: dict[str, str], notes: list[str]
) -> MergeReport:
    """Return the report of what was done by a plan."""
    from mats_hub.reading import compute_dtype

    return MergeReport(
        recipe=plan.recipe.model_dump(mode="json"),
        base=_facts(plan.base.source) if plan.base else None,
        experts=[_expert_facts(plan, index) for index in range(len(plan.experts))],
        tensors=records,
        environment=_environment(str(device), str(compute_dtype(plan, device)).removeprefix("torch.")),
        files=files,
        notes=notes,
    )


def write_surroundings(plan: Plan, folder: Path) -> list[str]:
    """Write all that a merged model is loaded with beside its weights: config, heads of its tasks, tokenizer; return notes."""
    if plan.recipe.output.format == "full":  # a config.json beside an adapter would make it look like a model
        _write_config(plan, folder)
    for expert in plan.experts:
        _write_task(plan, expert, folder / TASKS_FOLDER / expert.name)
    return copy_companions(plan.companions, [expert.source for expert in plan.experts], folder)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _write_config(plan: Plan, folder: Path) -> None:
    if plan.reference.config:
        _write_json(folder / CONFIG_FILE, _as_merged(plan, plan.reference.config))


def _as_merged(plan: Plan, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without its author's path and with the dtype the merged weights are stored in."""
    config = {key: value for key, value in config.items() if key not in ("_name_or_path", "torch_dtype", "dtype")}
    stored = plan.reference.config.get("dtype") or plan.reference.config.get("torch_dtype")
    dtype = stored if plan.recipe.output.dtype == "stored" else plan.recipe.output.dtype
    return {**config, "dtype": dtype} if dtype else config


def _write_task(plan: Plan, expert: Expert, folder: Path) -> None:
    """Write the config and the head with which the merged body becomes this expert's model."""
    folder.mkdir(parents=True)
    config = _as_merged(plan, expert.task_config(plan.reference.config))
    if "vocab_size" in config and "vocab_size" in plan.reference.config:
        config["vocab_size"] = plan.reference.config["vocab_size"]
    if config.get("model_type"):
        name = expert.auto_class or (plan.reference.config.get("architectures") or ["AutoModel"])[0]
        config["architectures"] = [concrete_class(name, config)]
    _write_json(folder / CONFIG_FILE, config)
    head = {own: expert.checkpoint.headers[expert.whole[own]] for own in plan.kept[expert.name]}
    if head:
        with CheckpointWriter(
            folder, head, max_shard_bytes=sum(header.nbytes for header in head.values()), metadata={}
        ) as writer:
            for own in writer.order:
                writer.write(own, expert.whole_tensor(own))


def _facts(source: Source) -> dict[str, Any]:
    card = source.front_matter
    return {
        "model": source.public_spec,
        "repo_id": source.repo_id,
        "commit": source.commit,
        "license": card.get("license") if isinstance(card.get("license"), str) else None,
        "language": card.get("language"),
        "pipeline_tag": card.get("pipeline_tag"),
        "library": card.get("library_name"),
    }


def _expert_facts(plan: Plan, index: int) -> dict[str, Any]:
    expert, statistics, config = plan.experts[index], plan.statistics[index], plan.reference.config
    own_class = expert.auto_class or (config.get("architectures") or [""])[0]
    return {
        **_facts(expert.source),
        "name": expert.name,
        "kind": expert.kind,
        "weight": expert.weight,
        "kept": plan.kept[expert.name],
        "class": own_class if config.get("model_type") else "",  # without a type it is no model of transformers
        "statistics": asdict(statistics.provenance) if statistics else None,
    }


def _environment(device: str, dtype: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {
        "mats_hub": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "safetensors": version("safetensors"),
        "python": platform.python_version(),
        "device": name,
        "compute dtype": dtype,
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
