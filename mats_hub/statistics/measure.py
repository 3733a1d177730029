"""Measuring an expert's statistics on its task's data, from an id or folder to a file's content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mats_hub.adapter import Ia3Adapter
from mats_hub.architecture import stored_pieces
from mats_hub.checkpoint import parse_size
from mats_hub.device import choose_device, memory_errors
from mats_hub.errors import RecipeError, StatisticsError, unknown
from mats_hub.expert import Expert
from mats_hub.loading import DEVICE_MAPS, load_adapted, load_expert, part_names
from mats_hub.lora import LoraAdapter
from mats_hub.processes import agreed, join, local_device, wait
from mats_hub.progress import Progress, silent
from mats_hub.recipe import STATISTICS_KINDS
from mats_hub.source import Source, open_source
from mats_hub.statistics.accumulate import Sums
from mats_hub.statistics.collect import NO_EXAMPLE, Survey, collect, survey
from mats_hub.statistics.dataset import Columns, listed, load_dataset
from mats_hub.statistics.file import Provenance, Statistics
from mats_hub.statistics.parallel import total
from mats_hub.statistics.passes import Record, costs, divide, free_memory
from mats_hub.statistics.sketch import Sketch
from mats_hub.statistics.task_data import TaskData
from mats_hub.statistics.tasks import GENERATED, GENERATED_TASK, generate, open_task
from mats_hub.statistics.watch import transposed_modules

MODULES = ("touched", "all")
LABELS = ("data", "model")


@memory_errors(
    "measuring statistics",
    "Cut texts shorter (max_length, --max-length), take smaller batches (--batch-size), measure sketches (--rank), or name "
    "another device (--device)",
)
def compute_statistics(
    model: str | Path,
    *,
    dataset: Any = None,
    kind: str | Sequence[str] | None = None,
    modules: str = "touched",
    for_adapter: bool = False,
    rank: int | None = None,
    config: str | None = None,
    split: str | None = None,
    text: str | Sequence[str] = (),
    label: str | None = None,
    image: str | None = None,
    target: str | None = None,
    messages: str | None = None,
    audio: str | None = None,
    choices: str | Sequence[str] = (),
    labels: str = "data",
    task: str | None = None,
    base: str | None = None,
    examples: int = 1000,
    batch_size: int = 16,
    max_length: int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    storage: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
    memory: str | int | None = None,
    output: str | Path | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Measure what curvatures are made from: one pass over a task's data with the task's expert.

    Under ``torchrun`` or ``accelerate launch`` the batches are shared out over the processes, and the first writes the file.
    Where the sums do not fit in memory, the data is gone over in several passes. With an `output`, what is done is recorded
    beside it meanwhile, so that the same call goes on where an interrupted one stopped, to the same bytes.

    Args:
        model: the expert, a Hub id or folder. An adapter is measured merged into its base, the vectors of an (IA)³ adapter
            as they stand beside it.
        dataset: Hub id ``owner/name[@revision]``, JSONL/CSV/Parquet file, a folder of them or of images by class, a
            `datasets.Dataset`, or a list of examples. A causal language model can do without: it is measured on text that it
            generates itself, `examples` times up to `max_length` tokens (128).
        kind: any of ``gram``, ``kfac`` (which holds ``gram``), ``fisher``, ``block_fisher`` (of vectors). When not given,
            ``kfac``, and for an (IA)³ adapter ``block_fisher``.
        modules: of an adapter, ``touched`` measures only what it changes, ``all`` the whole model (which is needed where the
            adapters it is merged with change other modules). An (IA)³ adapter's vectors are measured unless it is ``all``.
        for_adapter: store only what merging a LoRA adapter into an adapter needs: sketches of the input Grams (kind
            ``gram``) of the modules it touches, a few MB, in which the products with its own A factors are exact.
        rank: measure sketches of the Grams with so many columns, in place of ``[d, d]`` matrices; for an adapter at least its
            own. When not given, 64 with `for_adapter`, and no sketches otherwise.
        config: the data set's configuration.
        split: the data set's split (``validation``).
        text: text column, or two of them for sentence pairs; inferred from usual names when not given.
        label: label column.
        image: image column.
        target: target text column.
        audio: column of sounds, as `datasets.Audio` decodes them or as lists of samples.
        choices: column of the answers to choose from, or one column for each; `label` tells the right one.
        messages: column of conversations (lists of role and content), put through the tokenizer's chat template; only the
            assistant's tokens count in the loss.
        labels: ``data`` (empirical Fisher) or ``model`` (true Fisher: drawn from the model's own predictions).
        task: the kind of task, when the model's class does not tell.
        base: an adapter's base, when it is not the one it names; or the model that the expert is a part of, as the encoder of
            CLIP that sees, and in which it is measured.
        examples: at most so many, drawn at random when there are more.
        batch_size: examples in one pass; results do not depend on it.
        max_length: tokens after which a text is cut; the tokenizer's limit otherwise.
        seed: of the draw of examples.
        dtype: what the model runs in; sums are taken in float32.
        storage: dtype that matrices are stored in.
        device: ``auto``, ``cpu``, ``cuda``, ``mps``.
        device_map: how transformers spreads a model that is larger than a device over several (``auto``, …), in place of
            `device`; one process then.
        memory: bytes that sums may take, a number or a text such as ``8GB``; what is free otherwise.
        output: where to write the file; nowhere when not given.
        token: Hub token; the one stored on this machine otherwise.
        progress: wraps the iteration over batches (iterable, total, description) to show it.

    Returns:
        The statistics; their file is at ``.path`` when `output` was given.

    Raises:
        SourceError: the model or the data cannot be found.
        StatisticsError: task or columns cannot be inferred, or a label does not fit the model.
        NumericalError: a non-finite activation or gradient.
        ResourceError: memory ran out.

    """
    from mats_hub import __version__

    source = open_source(model, token)
    expert = Expert(source, source.name)
    vectors = isinstance(expert.adapter, Ia3Adapter) and modules == "touched"
    if for_adapter and (not isinstance(expert.adapter, LoraAdapter) or kind not in (None, "gram", ["gram"], ("gram",))):
        raise RecipeError(
            f"statistics for merging adapters (for_adapter, --for-adapter) are Grams of a LoRA adapter, but {source.spec!r} is a "
            f"{expert.kind} and the kind asked for is {kind or 'not given'}; leave for_adapter or the kind out"
        )
    rank = 64 if rank is None and for_adapter else rank
    kinds = _kinds(kind or ("block_fisher" if vectors else "gram" if for_adapter else "kfac"), vectors)
    _check_choices(rank, modules, labels, device_map)
    below = base or (expert.adapter.base if expert.adapter else None)
    base_source = open_source(below, token) if below else None
    process, processes = join()
    place = choose_device(local_device(device))
    load = load_adapted if vectors else load_expert
    network = load(expert, base_source, dtype, device_map or str(place))
    place = next(network.parameters()).device
    only = _only(network, expert, base_source, vectors) if base_source and modules == "touched" else None
    columns = Columns(listed(text), label, image, target, messages, audio, listed(choices))
    files = [source, *([base_source] if base_source else [])]
    if dataset is None:
        loaded = generate(network, files, examples, max_length or 128, seed, place)
        dataset_name, commit, task = GENERATED, None, GENERATED_TASK
    else:
        loaded, dataset_name, commit = load_dataset(dataset, config, split, token)
        loaded = loaded.shuffle(seed=seed).select(range(examples)) if len(loaded) > examples else loaded
    data = open_task(
        type(network.get_base_model() if vectors else network).__name__,
        network.config,
        files,
        loaded,
        columns,
        task=task,
        max_length=max_length,
        needs_labels=kinds != ("gram",) and labels == "data",
    )
    data.sort_by_length()
    if labels == "model":
        data.draw_labels(network, seed, place)
    one_by_one = set(kinds) <= {"fisher", "block_fisher"}  # alone, examples need no padding
    size = 1 if one_by_one or data.singly else batch_size
    sample = next(data.batches(max(size, 2), place), None)
    if sample is None:
        raise StatisticsError(NO_EXAMPLE)
    named = {own: name for name, own in part_names(expert, base_source).items()} if base_source and expert.part else {}
    directions = _directions(expert.adapter, named) if isinstance(expert.adapter, LoraAdapter) else {}
    sketch = Sketch(rank, directions, seed) if rank else None
    forward = data.forward if data.classes else None
    seen = None if one_by_one else survey(network, sample, data.masks, only, False if size == 1 else None, forward)
    room = parse_size(memory) if memory is not None else free_memory(place, processes)
    weights = (source.fingerprint, base_source and base_source.fingerprint)
    asked = (kinds, rank, labels, seed, dtype, size, data.max_length, columns, data.task.name)
    settings = map(str, (*weights, loaded._fingerprint, *asked, processes, memory, __version__))
    record = Record(Path(output) if output else None, settings, process)
    passes = agreed(record.passes(divide(costs(network, seen, kinds, only, rank), room) or [[]]))
    measurement = Measurement(network, data, kinds, sketch, seen, size, place, process, processes, progress or silent)
    sums, dropped = Sums(), 0.0
    for number, names in enumerate(passes):
        of_several = f", pass {number + 1} of {len(passes)}" if len(passes) > 1 else ""
        part = measurement.sums(
            set(names), number, record, f"statistics of {source.name}{of_several}", bool(of_several)
        )
        part.narrow()
        dropped = max(dropped, part.finish_sketches())
        if not expert.adapter:
            part.as_stored(stored_pieces(network))
        if vectors:
            part.tensors = {_own_name(key): value for key, value in part.tensors.items()}
        sums = sums.joined(record.finished(number, part) if of_several else part)
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
        label_source="none" if kinds == ("gram",) else labels,
        max_length=data.max_length,
        seed=seed,
        dtype=dtype,
        sketch_rank=rank,
        dropped=dropped,
        transposed=tuple(transposed_modules(network)),
        library_version=__version__,
    )
    statistics = Statistics(provenance, sums)
    if output is not None and process == 0:
        statistics.save(output, storage)
    wait()
    if len(passes) > 1 and output is not None:  # the sums are on disk, where they are removed now
        statistics = Statistics.load(output) if process == 0 else Statistics(provenance, Sums(examples=sums.examples))
    record.clear()
    return statistics


@dataclass(frozen=True)
class Measurement:
    """How an expert's sums are measured, in as many passes over its data as they take.

    Attributes:
        network: the expert.
        data: its task's data.
        kinds: kinds of statistics.
        sketch: how Grams are sketched, if they are.
        seen: how the network treats its inputs; None where no Grams are measured.
        size: examples of a batch.
        place: where the network reads its inputs.
        process: this process's number.
        processes: how many share the batches.
        show: shows the progress.

    """

    network: Any
    data: TaskData
    kinds: tuple[str, ...]
    sketch: Sketch | None
    seen: Survey | None
    size: int
    place: torch.device
    process: int
    processes: int
    show: Progress

    def sums(self, names: set[str], number: int, record: Record, title: str, keep: bool) -> Sums:
        """Return the sums of one pass, of all processes; what is recorded of it already is not measured again.

        Args:
            names: the parameters that are measured.
            number: of the pass.
            record: what is done, and where it is recorded.
            title: what is shown.
            keep: whether to record the pass when it is done.

        """
        start = self.seen.start(names, self.sketch, "kfac" in self.kinds) if self.seen else Sums()
        part, done = record.load(number) or (start, 0)
        steps = len(range(self.process * self.size, len(self.data.dataset), self.size * self.processes))
        batches = self.data.batches(self.size, self.place, self.process + done * self.processes, self.processes)

        def after(part: Sums) -> None:
            record.save(number, part, (self.data.last_batch - self.process) // self.processes + 1)

        part = collect(
            self.network,
            self.show(batches, steps - done, title),
            self.kinds,
            self.data.loss,
            self.data.masks,
            names,
            self.sketch,
            self.seen,
            part,
            after,
            self.data.forward if self.data.classes else None,
        )
        if keep:
            record.save(number, part, steps, now=True)
        return total(part, self.place) if self.processes > 1 else part


def _check_choices(rank: int | None, modules: str, labels: str, device_map: str | None) -> None:
    if rank is not None and rank < 1:
        raise RecipeError(f"a sketch of rank {rank} (--rank) holds nothing; ask for 1 or more")
    for choice, value, known in (
        ("choice of modules", modules, MODULES),
        ("source of labels", labels, LABELS),
        ("device map", device_map, DEVICE_MAPS),
    ):
        if value is not None and value not in known:
            raise RecipeError(unknown(choice, value, known))


def _kinds(kind: str | Sequence[str], vectors: bool) -> tuple[str, ...]:
    given = (kind,) if isinstance(kind, str) else tuple(kind)
    for name in given:
        if name not in STATISTICS_KINDS:
            raise RecipeError(unknown("kind of statistics", name, STATISTICS_KINDS))
        if vectors and name in ("gram", "kfac"):
            raise RecipeError(
                f"kind {name!r} is of linear modules, but an (IA)³ adapter changes vectors; measure block_fisher or fisher, or "
                "the modules of base and adapter merged into a full checkpoint (modules='all', --modules all)"
            )
    return tuple(dict.fromkeys(given))


def _only(network: Any, expert: Expert, base: Source, vectors: bool) -> set[str] | None:
    """Return the names, in the loaded network, of what an adapter changes, or a part of a model has; None for all."""
    if expert.adapter and vectors:
        return {name for name, _ in network.named_parameters() if _own_name(name) in expert.adapter.changed}
    if expert.part:
        return set(part_names(expert, base))
    return {*expert.adapter.changed, *expert.adapter.saved} if expert.adapter else None


def _directions(adapter: LoraAdapter, named: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the A factor ``[r, in]`` of each linear module of the network that a LoRA adapter changes.

    `named` has the names in the network of what is called otherwise in the adapter.
    """
    linear = (name for name, factors in adapter.factors.items() if factors.form in ("linear", "parameter"))
    return {named.get(name, name).removesuffix(".weight"): adapter.delta(name).A for name in linear}


def _own_name(name: str) -> str:
    """Return how the adapter's file calls a parameter of a PEFT model, or a sum over it."""
    return name.removeprefix("base_model.model.").replace(".ia3_l.default", ".ia3_l")
