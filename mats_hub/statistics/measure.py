"""Measuring an expert's statistics on its task's data, from an id or folder to a file's content."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mats_hub.device import choose_device
from mats_hub.errors import RecipeError, unknown
from mats_hub.expert import Expert
from mats_hub.loading import load_expert
from mats_hub.progress import Progress, silent
from mats_hub.recipe import CurvatureKind
from mats_hub.source import open_source
from mats_hub.statistics.collect import collect, transposed_modules
from mats_hub.statistics.file import Provenance, Statistics
from mats_hub.statistics.tasks import Columns, load_dataset, open_task


def compute_statistics(
    model: str | Path,
    *,
    dataset: Any,
    kind: str | Sequence[str] = "kfac",
    config: str | None = None,
    split: str | None = None,
    text: str | Sequence[str] = (),
    label: str | None = None,
    image: str | None = None,
    target: str | None = None,
    task: str | None = None,
    base: str | None = None,
    examples: int = 1000,
    batch_size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    output: str | Path | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Measure what curvatures are made from: one pass over a task's data with the task's expert.

    Args:
        model: the expert, a Hub id or folder; an adapter is measured merged into its base.
        dataset: Hub id ``owner/name[@revision]``, JSONL/CSV/Parquet file, or a `datasets.Dataset`.
        kind: any of ``gram``, ``kfac`` (which holds ``gram``), ``fisher``.
        config: the data set's configuration.
        split: the data set's split (``validation``).
        text: text column, or two of them for sentence pairs; inferred from usual names when not given.
        label: label column.
        image: image column.
        target: target text column.
        task: the kind of task, when the model's class does not tell.
        base: an adapter's base, when it is not the one it names.
        examples: at most so many, drawn at random when there are more.
        batch_size: examples in one pass; results do not depend on it.
        max_length: tokens after which a text is cut; the tokenizer's limit otherwise.
        seed: of the draw of examples.
        dtype: what the model runs in.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        output: where to write the file; nowhere when not given.
        token: Hub token; the one stored on this machine otherwise.
        progress: wraps the iteration over batches (iterable, total, description) to show it.

    Returns:
        The statistics; their file is at ``.path`` when `output` was given.

    Raises:
        SourceError: the model or the data cannot be found.
        StatisticsError: task or columns cannot be inferred, or a label does not fit the model.
        NumericalError: a non-finite activation or gradient.

    """
    from mats_hub import __version__

    kinds = _kinds(kind)
    source = open_source(model, token)
    expert = Expert(source, source.name)
    base_source = open_source(base or expert.adapter.base, token) if expert.adapter else None
    loaded, dataset_name, commit = load_dataset(dataset, config, split, token)
    if len(loaded) > examples:
        loaded = loaded.shuffle(seed=seed).select(range(examples))
    place = choose_device(device)
    network = load_expert(expert, base_source, dtype, str(place))
    columns = Columns((text,) if isinstance(text, str) else tuple(text), label, image, target)
    files = [source, *([base_source] if base_source else [])]
    data = open_task(
        type(network).__name__,
        network.config,
        files,
        loaded,
        columns,
        task=task,
        max_length=max_length,
        needs_labels=kinds != ("gram",),
    )
    size = 1 if kinds == ("fisher",) else batch_size  # Fisher takes examples one by one: alone they need no padding
    steps = -(-len(loaded) // size)
    batches = (progress or silent)(data.batches(size, place), steps, f"statistics of {source.name}")
    sums = collect(network, batches, kinds, data.loss, data.masks)
    provenance = Provenance(
        kinds=kinds,
        model=source.public_spec,
        fingerprint=source.fingerprint,
        task=data.task.name,
        dataset=dataset_name,
        dataset_config=config,
        dataset_split=split or ("validation" if commit else None),
        dataset_commit=commit,
        columns=data.columns.as_dict(),
        examples=sums.examples,
        tokens=max(sums.tokens.values(), default=0),
        label_source="none" if kinds == ("gram",) else "data",
        max_length=data.max_length,
        seed=seed,
        dtype=dtype,
        transposed=tuple(transposed_modules(network)),
        library_version=__version__,
    )
    statistics = Statistics(provenance, sums)
    if output is not None:
        statistics.save(output)
    return statistics


def _kinds(kind: str | Sequence[str]) -> tuple[str, ...]:
    given = (kind,) if isinstance(kind, str) else tuple(kind)
    for name in given:
        if name not in get_args(CurvatureKind):
            raise RecipeError(unknown("kind of statistics", name, get_args(CurvatureKind)))
    return tuple(dict.fromkeys(given))
