"""The streaming loop: read one tensor of every model, merge it, write it, forget it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mats_hub.checkpoint import TORCH_DTYPES, CheckpointWriter, parse_size
from mats_hub.errors import NumericalError
from mats_hub.initialization import Context, MagnitudeRank
from mats_hub.journal import Journal
from mats_hub.matching import Match, finish, initialization, norm, prepare
from mats_hub.plan import PART_ENTRIES, Action, Entry, Plan
from mats_hub.processes import gathered, is_first, share, summed, wait
from mats_hub.progress import Progress, silent
from mats_hub.report import TensorRecord, Watch

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
            for group in show(mine, len(mine), f"merging ({plan.recipe.method}){which}"):
                merged = _merge_group(plan, group, context, device, writer)
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


def _merge_group(
    plan: Plan, group: list[Entry], context: Context, device: torch.device, writer: CheckpointWriter
) -> list[TensorRecord]:
    """Merge one tensor or several that are solved together, write them to their places, and return what is to be said of them."""
    if group[0].action is Action.INITIALIZE and plan.entry_by_entry:
        return [_merge_in_parts(plan, entry, context, device, writer) for entry in group]
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


def _merge_in_parts(
    plan: Plan, entry: Entry, context: Context, device: torch.device, writer: CheckpointWriter
) -> TensorRecord:
    """Merge one tensor part by part, so that memory holds a part of it and not the whole."""
    weights, initialize = [expert.weight for expert in plan.experts], initialization(plan)
    squares = [0.0] * (len(plan.experts) + 1)
    for start, origin, deltas in parts_at(plan, entry, device):
        merged = initialize(deltas, weights, context)
        value = origin + merged
        check_cast(value, writer.dtype(entry.key), entry.key)
        writer.put_part(entry.key, start, value)
        for number, tensor in enumerate((merged, *deltas)):
            squares[number] += norm(tensor) ** 2
    size, *norms = (math.sqrt(square) for square in squares)
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


def deltas_at(plan: Plan, entry: Entry, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return the origin (the base, or the experts' mean) and each expert's task vector from it, in the compute dtype.

    For a merge of adapters into an adapter the origin is zero, and the base's weights are not read, but for a tensor that
    an expert holds whole.
    """
    key, dtype = entry.key, compute_dtype(plan, device)
    if plan.base is None:
        values = [
            check_finite(e.whole_tensor(e.names[key]).to(device, dtype), f"expert {e.name!r}", key)
            for e in plan.experts
        ]
        origin = torch.stack(values).mean(0) if len(values) > 1 else values[0]
        return origin, [value - origin for value in values]
    if entry.origin is None:
        origin = torch.zeros(entry.header.shape, device=device, dtype=dtype)
    else:
        assert plan.base_weights is not None
        origin = check_finite(plan.base_weights.tensor(entry.origin).to(device, dtype), "the base", key)
    deltas = []
    for expert in plan.experts:
        delta = expert.delta(key, origin)
        dense = torch.zeros_like(origin) if delta is None else delta.dense(device, dtype)
        deltas.append(check_finite(dense, f"expert {expert.name!r}", key))
    return origin, deltas


def parts_at(plan: Plan, entry: Entry, device: torch.device) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
    """Yield what `deltas_at` returns in flat parts, for what is done entry by entry: from where, the origin, the task vectors.

    Where an expert does not hold the tensor whole (an adapter), there is one part.
    """
    readers = _readers(plan, entry)
    if not readers:
        origin, deltas = deltas_at(plan, entry, device)
        yield 0, origin.flatten(), [delta.flatten() for delta in deltas]
        return
    dtype, count = compute_dtype(plan, device), entry.header.numel
    size = PART_ENTRIES if device.type == "cpu" else 64 * PART_ENTRIES
    for start in range(0, count, size):
        parts = [
            check_finite(read(start, min(start + size, count)).to(device, dtype), owner, entry.key)
            for owner, read in readers
        ]
        origin = parts.pop() if plan.base else torch.stack(parts).mean(0) if len(parts) > 1 else parts[0]
        yield start, origin, [part - origin for part in parts]


def _readers(plan: Plan, entry: Entry) -> list[tuple[str, Callable[[int, int], Tensor]]]:
    """Return, for every expert and then the base, who it is and how to read a part; nothing unless all hold it whole."""
    key = entry.key
    found: list[tuple[str, Callable[[int, int], Tensor]]] = []
    for expert in plan.experts:
        own = expert.names.get(key)
        if own is None or own not in expert.whole or key in expert.rows:
            return []
        found.append((f"expert {expert.name!r}", partial(expert.checkpoint.part, expert.whole[own])))
    if plan.base is not None:
        if entry.origin is None or plan.base_weights is None:
            return []
        found.append(("the base", partial(plan.base_weights.part, entry.origin)))
    return found


def compute_dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """Return what is computed in: float32, or float64 where a model is stored in it and the device has it."""
    return torch.float64 if plan.is_double and device.type != "mps" else torch.float32


def thresholds(
    plan: Plan, densities: Sequence[float], device: torch.device, show: Progress
) -> dict[float, tuple[float, ...]]:
    """Return density → each expert's global trimming threshold, from two passes over the task vectors."""
    entries = plan.merged_entries
    ranks = {density: [MagnitudeRank(density) for _ in plan.experts] for density in densities}
    every = [rank for held in ranks.values() for rank in held]
    entries = share(entries, lambda entry: entry.header.numel)
    for number in (1, 2):
        for entry in show(entries, len(entries), f"magnitudes, pass {number} of 2"):
            for _, _, deltas in parts_at(plan, entry, device):
                for held in ranks.values():
                    for expert, rank, delta in zip(plan.experts, held, deltas, strict=True):
                        if expert.holds(entry.key):  # what an adapter does not touch is no part of its task vector
                            rank.add(delta)
        plan.finish_reading()
        for rank in every:
            rank.counts = summed(rank.counts)
            if number == 1:
                rank.narrow()
    return {density: tuple(rank.value() for rank in held) for density, held in ranks.items()}


def check_finite(tensor: Tensor, owner: str, key: str) -> Tensor:
    """Return the tensor, or raise `NumericalError` naming its owner when a value is not finite."""
    if not torch.isfinite(tensor).all():
        raise NumericalError(
            f"{owner} has a NaN or infinite value in tensor {key!r}; its training diverged or the file is damaged. "
            "Fetch it again or take another checkpoint"
        )
    return tensor


def check_cast(tensor: Tensor, dtype: str, key: str) -> None:
    """Raise `NumericalError` when the tensor does not stay finite in the dtype it is written in."""
    if tensor.is_floating_point() and not torch.isfinite(tensor.to(TORCH_DTYPES[dtype])).all():
        raise NumericalError(
            f"tensor {key!r} does not stay finite when it is written as {dtype} (largest magnitude "
            f"{float(tensor.abs().max()):.3g}); ask for a wider dtype (--dtype float32)"
        )
