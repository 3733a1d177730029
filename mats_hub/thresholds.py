"""Each expert's global trimming threshold: the k-th smallest magnitude of its whole task vector, counted while it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from mats_hub.initialization.ties import kept_rank
from mats_hub.plan import Plan
from mats_hub.processes import share, summed
from mats_hub.progress import Progress
from mats_hub.reading import Array, Span, in_parts, over_spans, spans

SAMPLE = 2**20
"""Entries of each task vector that are looked at for a first guess."""


class MagnitudeRank:
    """The k-th smallest magnitude of a vector too large to hold, exact, in a few streaming passes.

    The bits of a non-negative float32 grow with its value. A pass counts them in the bins of a window: first all magnitudes by
    their upper 16 bits, then those in the one bin that holds the k-th, by the lower 15; or, when there is a guess, the exact bits
    around it at once. How many lie below the window is counted, too, so that a guess that misses is noticed, and the passes
    begin as without one. Memory: 2¹⁸ counters.

    Use: `aim`, where there is a guess; until `value` is there, `add` every part and `narrow`. Threads may add at the same time.

    Attributes:
        counts: how many were below the window, in each of its bins, and above it. Those of several ranks, each with parts of its
            own, may be summed before `narrow`.
        value: the magnitude, 0 for an empty vector; None until it is known.

    """

    LOW_BITS = 15
    WINDOW = 1 << 18

    def __init__(self, density: float) -> None:
        self._density = density
        self.value: float | None = None
        self._lock = Lock()
        self._look(0, self.LOW_BITS, 1 << 16)

    def _look(self, start: int, shift: int, bins: int) -> None:
        self._start, self._shift, self._bins = start, shift, bins
        self.counts = torch.zeros(bins + 2, dtype=torch.int64)

    def aim(self, sample: Tensor) -> None:
        """Look where the rank is in a sample of the vector; where it keeps all or none of it, that says nothing."""
        rank = kept_rank(sample.numel(), self._density)
        if 1 < rank < sample.numel():
            bits = int(_bits(_bits(sample).view(torch.float32).kthvalue(rank).values))
            self._look(max(0, bits - self.WINDOW // 2), 0, self.WINDOW)

    def add(self, part: Tensor) -> None:
        """Count the magnitudes of a part, of any shape."""
        bits = _bits(part)
        if self._shift:
            below, inside = 0, bits.bitwise_right_shift_(self._shift)
        else:
            below, inside = _within(bits, self._start, self._bins)
        few = inside.numel() < self._bins
        found = inside.cpu() if few else torch.bincount(inside, minlength=self._bins).cpu()
        counts = self.counts.numpy()
        with self._lock:
            counts[0] += below
            if few:
                np.add.at(counts[1:-1], found.numpy(), 1)
            else:
                counts[1:-1] += found.numpy()
            counts[-1] += bits.numel() - below - inside.numel()

    def narrow(self) -> None:
        """End a pass: find the value, or the window to look at next."""
        count = int(self.counts.sum())
        if not count:
            self.value = 0.0
            return
        position = int(torch.searchsorted(self.counts.cumsum(0), kept_rank(count, self._density)))
        if not 1 <= position <= self._bins:
            self._look(0, self.LOW_BITS, 1 << 16)
        elif self._shift:
            self._look((position - 1) << self._shift, 0, 1 << self._shift)
        else:
            value = float(torch.tensor(self._start + position - 1, dtype=torch.int32).view(torch.float32))
            self.value = value if math.isfinite(value) else math.inf


def thresholds(
    plan: Plan, densities: Sequence[float], device: torch.device, show: Progress
) -> dict[float, tuple[float, ...]]:
    """Return density → each expert's global trimming threshold.

    Takes one pass over the task vectors, with a guess from a sample of them, where they can be read in parts; two where they
    cannot, and three where the guess misses.
    """
    ranks = {density: [MagnitudeRank(density) for _ in plan.experts] for density in densities}
    every = [rank for held in ranks.values() for rank in held]
    if not plan.streamed and all(in_parts(plan, entry) for entry in plan.merged_entries):
        for held in ranks.values():
            for rank, sample in zip(held, _samples(plan, device), strict=True):
                rank.aim(sample)
    entries, number = share(plan.merged_entries, lambda entry: entry.header.numel), 0

    def count(span: Span) -> Array:
        _, deltas = span.read_unchecked(plan, device)  # the merge itself tells of values that are not finite
        for held in ranks.values():
            for expert, rank, delta in zip(plan.experts, held, deltas, strict=True):
                # What an adapter does not touch is no part of its task vector.
                if rank.value is None and expert.holds(span.entry.key):
                    rank.add(delta)
        return np.zeros(1)

    while pending := [rank for rank in every if rank.value is None]:
        number += 1
        for _ in show(over_spans(plan, entries, device, count), len(entries), f"magnitudes, pass {number}"):
            pass
        plan.finish_reading()
        for rank in pending:
            rank.counts = summed(rank.counts)
            rank.narrow()
    return {density: tuple(rank.value or 0.0 for rank in held) for density, held in ranks.items()}


def _samples(plan: Plan, device: torch.device) -> list[Tensor]:
    """Return of each task vector the first entries of every span, the same share of each."""
    share = max(1, sum(entry.header.numel for entry in plan.merged_entries) // SAMPLE)
    found: list[list[Tensor]] = [[] for _ in plan.experts]
    for entry in plan.merged_entries:
        for span in spans(plan, entry, device):
            stop = span.start - (span.start - span.stop) // share
            _, deltas = replace(span, stop=stop).read_unchecked(plan, device)
            for held, delta in zip(found, deltas, strict=True):
                held.append(delta.cpu())
    return [torch.cat(held) if held else torch.empty(0) for held in found]


def _bits(values: Tensor) -> Tensor:
    """Return the bits of magnitudes in float32, which grow with them."""
    return values.detach().to(torch.float32).abs().flatten().view(torch.int32)


def _within(bits: Tensor, start: int, count: int) -> tuple[int, Tensor]:
    """Return how many are below `start`, and, for those that are less than `count` above it, by how much; overwrites `bits`."""
    offsets = bits.sub_(start)
    if bits.device.type != "cpu":
        return int((offsets < 0).sum()), offsets[(offsets >= 0) & (offsets < count)]
    # NumPy compares, counts and finds several times faster than torch. What is negative is large without a sign.
    array = offsets.numpy()
    inside = np.flatnonzero(array.view(np.uint32) < count)
    return int(np.count_nonzero(array < 0)), torch.from_numpy(array[inside])
