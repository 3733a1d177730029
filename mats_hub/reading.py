"""What a merge computes with: the task vectors of one tensor, whole or in parts, and whether values are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mats_hub.adapter import FoldedAdapter
from mats_hub.checkpoint import TORCH_DTYPES, Checkpoint
from mats_hub.device import moved, one_thread
from mats_hub.errors import NumericalError
from mats_hub.matching import norm
from mats_hub.plan import PART_ENTRIES, SMALL_BYTES, Entry, Plan
from mats_hub.threads import give_back_freed_memory, in_threads, keep_freed_memory, workers

Array = NDArray[np.float64]
Item = TypeVar("Item")
Sum = TypeVar("Sum", Tensor, Array)
Result = TypeVar("Result")


def compute_dtype(plan: Plan, device: torch.device) -> torch.dtype:
    """Return what is computed in: float32, or float64 where a model is stored in it and the device has it."""
    return torch.float64 if plan.is_double and device.type != "mps" else torch.float32


def deltas_at(plan: Plan, entry: Entry, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Return the origin (the base, or the experts' mean) and each expert's task vector from it, in the compute dtype.

    For a merge of adapters into an adapter the origin is zero, and the base's weights are not read, but for a tensor that
    an expert holds whole.
    """
    key, dtype = entry.key, compute_dtype(plan, device)
    if plan.base is None:
        values = [
            check_finite(moved(e.whole_tensor(e.names[key]), device, dtype), f"expert {e.name!r}", key)
            for e in plan.experts
        ]
        origin = torch.stack(values).mean(0) if len(values) > 1 else values[0]
        return origin, [value - origin for value in values]
    if entry.origin is None:
        origin = torch.zeros(entry.header.shape, device=device, dtype=dtype)
    else:
        assert plan.base_weights is not None
        origin = check_finite(moved(plan.base_weights.tensor(entry.origin), device, dtype), "the base", key)
    deltas = []
    for expert in plan.experts:
        delta = expert.delta(key, origin)
        dense = torch.zeros_like(origin) if delta is None else delta.dense(device, dtype)
        deltas.append(check_finite(dense, f"expert {expert.name!r}", key))
    return origin, deltas


@dataclass(frozen=True)
class Span:
    """Flat entries of one tensor, from `start` up to `stop` (excluded).

    Attributes:
        entry: the tensor.
        start: the first entry.
        stop: behind the last entry.
        readers: what holds it: the experts, and then the base; empty where an expert does not hold the tensor whole, which is
            one span then.

    """

    entry: Entry
    start: int
    stop: int
    readers: tuple[tuple[str, Checkpoint, str], ...]

    def read(self, plan: Plan, device: torch.device) -> tuple[Tensor, list[Tensor], list[float]]:
        """Return what `deltas_at` returns of these entries, flat, and the norms of the task vectors.

        Raises:
            NumericalError: a value that is not finite, naming whose it is.

        """
        origin, deltas = self.read_unchecked(plan, device)
        norms = [norm(delta) for delta in deltas]
        if not all(map(math.isfinite, norms)):  # those of finite values may overflow
            for (owner, *_), part in zip(self.readers, self._parts(origin.dtype, device), strict=True):
                check_finite(part, owner, self.entry.key)
        return origin, deltas, norms

    def read_unchecked(self, plan: Plan, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Return the same without norms, and with the values that are not finite."""
        if not self.readers:
            origin, deltas = deltas_at(plan, self.entry, device)
            return origin.flatten(), [delta.flatten() for delta in deltas]
        parts = self._parts(compute_dtype(plan, device), device)
        if plan.base:
            origin = parts.pop()
            return origin, [part.sub_(origin) for part in parts]
        origin = torch.stack(parts).mean(0) if len(parts) > 1 else parts[0]
        return origin, [part - origin for part in parts]

    def _parts(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        pinned = device.type == "cuda"
        # One after the other: what was just read is still in the processor's cache, or is copied while the next is read.
        return [
            moved(reader.part(name, self.start, self.stop, pinned), device, dtype) for _, reader, name in self.readers
        ]


def spans(plan: Plan, entry: Entry, device: torch.device) -> list[Span]:
    """Return a tensor's entries in spans of a size that does not depend on the number of threads."""
    readers, count = _readers(plan, entry), entry.header.numel
    size = count if not readers else PART_ENTRIES if device.type == "cpu" else 16 * PART_ENTRIES
    starts = range(0, count, max(size, 1)) or (0,)
    return [Span(entry, start, min(start + size, count), readers) for start in starts]


def in_parts(plan: Plan, entry: Entry) -> bool:
    """Tell whether `spans` has parts of a tensor: whether all models hold it whole."""
    return bool(_readers(plan, entry))


def over_spans(
    plan: Plan, entries: Iterable[Entry], device: torch.device, do: Callable[[Span], Sum]
) -> Iterator[tuple[Entry, Sum]]:
    """Yield of each tensor the sum of what `do` returns of its spans, working on several spans at a time.

    What is read by range is read in order, and what is made of adapters takes a whole tensor: one after the other.
    """
    keep_freed_memory()
    alone = plan.streamed or any(expert.adapter for expert in plan.experts)
    every = (span for entry in entries for span in spans(plan, entry, device))
    made = in_threads(lambda span: (span.entry, do(span)), every, 1 if alone else workers(device))
    for _, held in groupby(made, key=lambda one: one[0].key):
        pairs = iter(held)
        entry, total = next(pairs)
        for _, value in pairs:
            total += value
        yield entry, total
    give_back_freed_memory()


def over_tensors(
    plan: Plan,
    items: Sequence[Item],
    size: Callable[[Item], int],
    device: torch.device,
    do: Callable[[Item], Result],
) -> Iterator[Result]:
    """Yield what `do` returns of each item, in any order: of those of a small `size` several at a time, then of the others.

    `size` is about how many bytes of memory an item takes. What PEFT folds, it folds in one model; and what is read by range is
    read in order: small ones are one at a time then, but with one thread of torch all the same, so that their bytes are too.
    """
    keep_freed_memory()
    alone = plan.streamed or any(isinstance(expert.adapter, FoldedAdapter) for expert in plan.experts)
    small: list[Item] = []
    large: list[Item] = []
    limit = _at_once(device)
    for item in items:
        (small if size(item) <= limit else large).append(item)
    count = 1 if alone else workers(device)
    with one_thread() if device.type == "cpu" else nullcontext():
        yield from in_threads(do, small, count)
    yield from map(do, large)
    give_back_freed_memory()


def _at_once(device: torch.device) -> int:
    """Return how many bytes of memory a tensor may take for several to be merged at a time."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // (2 * workers(device))
    return SMALL_BYTES


def _readers(plan: Plan, entry: Entry) -> tuple[tuple[str, Checkpoint, str], ...]:
    key, found = entry.key, []
    for expert in plan.experts:
        own = expert.names.get(key)
        if own is None or own not in expert.whole or key in expert.rows:
            return ()
        found.append((f"expert {expert.name!r}", expert.checkpoint, expert.whole[own]))
    if plan.base is not None:
        if entry.origin is None or plan.base_weights is None:
            return ()
        found.append(("the base", plan.base_weights, entry.origin))
    return tuple(found)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no value is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    # An order of magnitude faster than `isfinite`; the norm of finite values may overflow, then they are looked at.
    return math.isfinite(norm(tensor)) or bool(torch.isfinite(tensor).all())


def check_finite(tensor: Tensor, owner: str, key: str) -> Tensor:
    """Return the tensor, or raise `NumericalError` naming its owner when a value is not finite."""
    if not is_finite(tensor):
        raise NumericalError(
            f"{owner} has a NaN or infinite value in tensor {key!r}; its training diverged or the file is damaged. "
            "Fetch it again or take another checkpoint"
        )
    return tensor


def check_cast(tensor: Tensor, dtype: str, key: str) -> None:
    """Raise `NumericalError` when the tensor does not stay finite in the dtype it is written in."""
    target = TORCH_DTYPES[dtype]
    if not tensor.is_floating_point() or not tensor.numel():
        return
    if target.is_floating_point:
        low, high = torch.aminmax(tensor)
        if max(-float(low), float(high)) <= torch.finfo(target).max:  # false of NaN
            return
    if not torch.isfinite(tensor.to(target)).all():
        raise NumericalError(
            f"tensor {key!r} does not stay finite when it is written as {dtype} (largest magnitude "
            f"{float(tensor.abs().max()):.3g}); ask for a wider dtype (--dtype float32)"
        )
