"""The streaming loop: read one tensor of every model, merge it, write it, forget it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mats_hub.checkpoint import CheckpointWriter, parse_size
from mats_hub.initialization import Context
from mats_hub.journal import Journal
from mats_hub.matching import Initialize, Match, finish, initialization, norm, prepare
from mats_hub.plan import Action, Entry, Plan
from mats_hub.processes import gathered, is_first, share, wait
from mats_hub.progress import Progress, silent
from mats_hub.reading import Array, Span, check_cast, check_finite, deltas_at, in_parts, over_spans, over_tensors
from mats_hub.report import TensorRecord, Watch
from mats_hub.thresholds import thresholds

SOLVED_TOGETHER = 2**23
"""Entries of the tensors of one shape that an accelerator solves at once: small ones do not keep it busy one by one."""


def merge_tensors(
    plan: Plan,
    folder: Path,
    device: torch.device,
    metadata: dict[str, str],
    progress: Progress | None = None,
    watch: Watch | None = None,
    journal: Journal | None = None,
) -> list[TensorRecord]:
    """Write the merged checkpoint of a plan without problems into `folder`.

    Memory holds one tensor of every model and its statistics at a time. Everything is computed in float32 (float64 where
    a model is stored in it) and written in the dtype the recipe asks for. Shards that the journal has are not made again.
    Several processes share out the tensors of each shard among themselves; what comes out does not depend on how many
    there are.

    Returns:
        One record per tensor, in the order of the files, then those that are not written; in every process.

    Raises:
        NumericalError: a non-finite value in a model or in the result, or a curvature that is not PSD, naming the tensor.

    """
    entries = {entry.key: entry for entry in plan.entries}
    show, journal, layout = progress or silent, journal or Journal(folder), plan.written
    limit = parse_size(plan.recipe.output.max_shard_size)
    with CheckpointWriter(folder, layout, limit, metadata, there=journal.files) as writer:
        for checkpoint, chunks in zip(plan.checkpoints, journal.notes.get("streamed", ()), strict=False):
            checkpoint.recall(chunks)
        context = make_context(plan, device, show, journal) if writer.pending else Context()
        for number, (file, keys) in enumerate(writer.pending.items(), start=1):
            groups = _groups(plan, [entries[key] for key in keys], device)
            mine = share(groups, lambda group: sum(plan.work(entry) for entry in group))
            made: list[TensorRecord] = []
            _begin(writer, file)
            which = f", file {number} of {len(writer.pending)}" if len(writer.pending) > 1 else ""
            merging = _merge_groups(plan, mine, context, device, writer)
            for merged in show(merging, len(mine), f"merging ({plan.recipe.method}){which}"):
                if watch:
                    for record in merged:
                        watch(record)
                made += merged
            writer.release(file)
            told = gathered((made, [checkpoint.streamed() for checkpoint in plan.checkpoints]))
            journal.notes["streamed"] = _union([streamed for _, streamed in told])
            if is_first():
                writer.complete(file)
            journal.finished(folder / file, [record for made, _ in told for record in made])
    records = {key: TensorRecord(key, entry.action, entry.reason) for key, entry in entries.items()} | journal.records
    return [records[key] for key in (*layout, *(key for key in entries if key not in layout))]


def _union(parts: list[list[dict[str, dict[str, str]]]]) -> list[dict[str, dict[str, str]]]:
    """Return what all processes have streamed of each checkpoint."""
    found: list[dict[str, dict[str, str]]] = [{} for _ in parts[0]]
    for part in parts:
        for ours, theirs in zip(found, part, strict=True):
            for filename, chunks in theirs.items():
                ours.setdefault(filename, {}).update(chunks)
    return found


def _begin(writer: CheckpointWriter, file: str) -> None:
    """Open a shard that several processes write to."""
    if is_first():
        writer.begin(file)
    wait()
    if not is_first():
        writer.begin(file, create=False)


def _groups(plan: Plan, entries: list[Entry], device: torch.device) -> list[list[Entry]]:
    """Return the tensors in groups that are solved at once: small ones of one shape, on an accelerator."""
    groups: list[list[Entry]] = []
    open_groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        like = (entry.header.shape, entry.transposed, entry.stacked)
        group = open_groups.get(like)
        fits = group is not None and (len(group) + 1) * entry.header.numel <= SOLVED_TOGETHER
        if group is not None and fits and device.type != "cpu" and entry.action is Action.SOLVE:
            group.append(entry)
            continue
        groups.append([entry])
        if entry.action is Action.SOLVE:
            open_groups[like] = groups[-1]
    return groups


def _merge_groups(
    plan: Plan, groups: list[list[Entry]], context: Context, device: torch.device, writer: CheckpointWriter
) -> Iterator[list[TensorRecord]]:
    """Merge and write all tensors of some groups; yield what is to be said of each group, in any order.

    What is merged entry by entry is done in small parts, several at a time; of what needs whole tensors, small ones are.
    """
    apart = [
        entry
        for group in groups
        for entry in group
        if entry.action is Action.INITIALIZE and plan.entry_by_entry and in_parts(plan, entry)
    ]
    merge = partial(_merge_span, plan, initialization(plan), context=context, device=device, writer=writer)
    for entry, squares in over_spans(plan, apart, device, merge):
        yield [_of_spans(entry, squares)]
    done = {entry.key for entry in apart}
    whole = [group for group in groups if group[0].key not in done]
    merge_whole = partial(_merge_group, plan, context=context, device=device, writer=writer)
    yield from over_tensors(plan, whole, lambda group: sum(map(plan.working_bytes, group)), device, merge_whole)


def _merge_group(
    plan: Plan, group: list[Entry], context: Context, device: torch.device, writer: CheckpointWriter
) -> list[TensorRecord]:
    """Merge one tensor or several that are solved together, write them to their places, and return what is to be said of them."""
    if group[0].action not in (Action.SOLVE, Action.INITIALIZE):
        for entry in group:
            _write(writer, entry.key, check_finite(plan.reference.tensor(entry.key), "the base", entry.key))
        return [TensorRecord(entry.key, entry.action, entry.reason) for entry in group]
    matches: list[Match] = []
    origins: list[Tensor] = []
    for entry in group:
        origin, deltas = deltas_at(plan, entry, device)
        matches.append(prepare(plan, entry, deltas, replace(context, origin=origin), stored=True))
        origins.append(origin)
    made = finish(plan, matches)
    for entry, origin, merged in zip(group, origins, made, strict=True):
        _write(writer, entry.key, origin + merged.value)
    return [merged.record for merged in made]


def _write(writer: CheckpointWriter, key: str, tensor: Tensor) -> None:
    check_cast(tensor, writer.dtype(key), key)
    writer.put(key, tensor)


def _merge_span(
    plan: Plan, initialize: Initialize, span: Span, context: Context, device: torch.device, writer: CheckpointWriter
) -> Array:
    """Merge some entries of a tensor and write them to their place; return the squared norms of the result and the experts'."""
    origin, deltas, norms = span.read(plan, device)
    weights, place = [expert.weight for expert in plan.experts], replace(context, key=span.entry.key, start=span.start)
    merged = initialize(deltas, weights, place)
    value = origin + merged
    check_cast(value, writer.dtype(span.entry.key), span.entry.key)
    writer.put_part(span.entry.key, span.start, value)
    return np.square([norm(merged), *norms])


def _of_spans(entry: Entry, squares: Array) -> TensorRecord:
    """Return what is to be said of a tensor that was merged in spans."""
    size, *norms = np.sqrt(squares).tolist()
    record = TensorRecord(entry.key, entry.action, entry.reason, initialization_norm=size, solution_norm=size)
    return replace(record, expert_norms=tuple(norms))


def make_context(plan: Plan, device: torch.device, show: Progress, journal: Journal) -> Context:
    """Return what initializations may depend on; where whole task vectors are trimmed, they are read for the thresholds."""
    context = Context(experts=tuple(e.name for e in plan.experts), seed=plan.recipe.seed)
    if plan.recipe.initialization.global_density is not None:
        density = plan.recipe.initialization.global_density
        if "thresholds" not in journal.notes:
            journal.note("thresholds", thresholds(plan, [density], device, show)[density])
        return replace(context, thresholds=tuple(journal.notes["thresholds"]))
    return context
